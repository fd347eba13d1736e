"""The arguments of `kvdock bench`, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Everything the user chose; None where the config or the machine decides."""

    model_path: str = "smollm2-135m"
    cfg_path: str = "RULER"
    device: tuple[str, ...] = ()
    gp_num: str | None = None
    parallel: str = "map"
    workers: int | None = None
    ray_address: str | None = None
    launcher: str | None = None
    torch_dtype: str | None = None
    acceleration: tuple[str, ...] = ()
    batch_size: str | None = None
    budget: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    limit: int | None = None
    max_length: str | None = None
    template: str | None = None
    save_tag: str | None = None
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    server: tuple[str, ...] = ("transformers",)
    vllm_python: str | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    output_dir: Path = Path("runs")
    adapter_path: str | None = None
    time_limit: float | None = None
    trust_remote_code: bool = False
    command: tuple[str, ...] = ()
