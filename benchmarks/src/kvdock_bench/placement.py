"""Read --device, --gp_num, --parallel, --workers and --ray-address: who computes where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvdock_bench.errors import BenchError

MAP, TENSOR = "map", "tp"
_GP_NUM = re.compile(r"(1/)?([1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process puts its model.

    Args:
        devices: torch devices; several take the layers in turn.
        rank, ranks: this process among those that split every layer (tensor parallelism).
        meeting: the address at which these processes find each other, as torch's ``init_method``.
    """

    devices: tuple[str, ...] = ("cpu",)
    rank: int = 0
    ranks: int = 1
    meeting: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """How many models run at once, and on what.

    Args:
        gpus: indices of this machine's GPUs; empty on CPU and where a cluster has its own.
        per_model: GPUs (processes on CPU) that one model is spread over.
        per_gpu: models that share one GPU.
        parallel: "map" spreads the layers of a model, "tp" splits every layer.
        workers: models at work at the same time; 0 lets a cluster decide.
        cpu: whether the models run on CPU.
        ray_address: of a running cluster; None for this machine alone.
    """

    gpus: tuple[int, ...] = ()
    per_model: int = 1
    per_gpu: int = 1
    parallel: str = MAP
    workers: int = 1
    cpu: bool = True
    ray_address: str | None = None

    @property
    def several_processes(self) -> bool:
        """Say whether more than this process is needed."""
        return self.workers != 1 or self.ray_address is not None or self.processes > 1

    @property
    def processes(self) -> int:
        """Return the processes of one model."""
        return self.per_model if self.parallel == TENSOR else 1

    def devices(self, worker: int) -> tuple[str, ...]:
        """Return the torch devices of one model on this machine."""
        if self.cpu:
            return ("cpu",) * self.processes
        if self.per_gpu > 1:
            return (f"cuda:{self.gpus[worker % len(self.gpus)]}",)
        first = worker * self.per_model
        return tuple(f"cuda:{index}" for index in self.gpus[first : first + self.per_model])

    def places(self, devices: tuple[str, ...], meeting: str) -> list[Place]:
        """Return the place of each process of one model."""
        if self.processes == 1:
            return [Place(devices)]
        ranks = len(devices)
        return [Place((name,), rank, ranks, meeting) for rank, name in enumerate(devices)]

    def describe(self) -> dict[str, object]:
        """Return what run.json says about it."""
        return {
            "device": "cpu" if self.cpu else [*self.gpus],
            "workers": self.workers,
            "gp_num": f"1/{self.per_gpu}" if self.per_gpu > 1 else str(self.per_model),
            "parallel": self.parallel,
            "cluster": self.ray_address is not None,
        }


def parse_placement(
    devices: Sequence[str],
    gp_num: str | None = None,
    *,
    parallel: str = MAP,
    workers: int | None = None,
    ray_address: str | None = None,
    visible: int,
) -> Placement:
    """Check the flags against each other and against the GPUs there are.

    Args:
        visible: GPUs of this machine.
    """
    per_model, per_gpu = _gp_num(gp_num)
    if parallel not in (MAP, TENSOR):
        raise BenchError(
            f"--parallel {parallel}: expected map (layers spread over GPUs) or tp (tensor"
            " parallelism)."
        )
    if parallel == TENSOR and per_model == 1:
        raise BenchError("--parallel tp needs several GPUs per model, as in --gp_num 2.")
    if workers is not None and workers < 1:
        raise BenchError(f"--workers {workers}: expected 1 or more.")
    names = [name.removeprefix("cuda:") for name in devices]
    on_cpu = names == ["cpu"] or (not names and not visible)
    if ray_address is not None:
        if names and not on_cpu:
            raise BenchError(
                "--device names GPUs of this machine; a cluster chooses its own. Leave it out (or"
                " say --device cpu) and choose how many models run with --workers."
            )
        cpu = names == ["cpu"]
        _check_cpu(cpu, per_model, per_gpu, parallel)
        return Placement((), per_model, per_gpu, parallel, workers or 0, cpu, ray_address)
    if on_cpu:
        _check_cpu(True, per_model, per_gpu, parallel)
        return Placement((), per_model, 1, parallel, workers or 1)
    gpus = _gpus(names, visible, per_model)
    if len(gpus) % per_model:
        raise BenchError(
            f"--gp_num {per_model} on {len(gpus)} device{'s' * (len(gpus) != 1)}: every model takes"
            f" {per_model} GPUs, so name {per_model}, {2 * per_model}, … with --device."
        )
    models = len(gpus) // per_model * per_gpu
    if workers not in (None, models):
        raise BenchError(
            f"--workers {workers}: --device and --gp_num make {models} already. Leave --workers"
            " out; it is for CPU and for clusters."
        )
    return Placement(gpus, per_model, per_gpu, parallel, models, cpu=False)


def _gp_num(text: str | None) -> tuple[int, int]:
    """Return GPUs per model and models per GPU; one of the two is 1."""
    match = _GP_NUM.fullmatch((text or "1").strip())
    if match is None:
        raise BenchError(
            f"--gp_num {text}: expected GPUs per model (1, 2, …) or a share of a GPU (1/2, 1/3, …)."
        )
    count = int(match[2])
    return (1, count) if match[1] else (count, 1)


def _gpus(names: Sequence[str], visible: int, per_model: int) -> tuple[int, ...]:
    if not names:
        if per_model > visible:
            raise BenchError(f"--gp_num {per_model}: torch sees {_count(visible)}.")
        return tuple(range(per_model))
    for name in names:
        if not name.isdecimal():
            alone = " It stands alone." if name == "cpu" else ""
            raise BenchError(f"--device is {name!r}, expected cpu or the index of a GPU.{alone}")
        if len(name) > 9 or int(name) >= visible:
            raise BenchError(
                f"--device {name}: torch sees {_count(visible)}. Name one of them, or cpu."
            )
    gpus = tuple(map(int, names))
    twice = sorted({gpu for gpu in gpus if gpus.count(gpu) > 1})
    if twice:
        raise BenchError(
            f"--device names GPU {twice[0]} twice; several models on a GPU are --gp_num 1/2."
        )
    return gpus


def _count(visible: int) -> str:
    if not visible:
        return "no GPU"
    return (
        f"{visible} GPU{'s' * (visible != 1)} (0 to {visible - 1})" if visible > 1 else "1 GPU (0)"
    )


def _check_cpu(cpu: bool, per_model: int, per_gpu: int, parallel: str) -> None:
    if cpu and per_gpu > 1:
        raise BenchError(f"--gp_num 1/{per_gpu} shares a GPU; on CPU say --workers {per_gpu}.")
    if cpu and per_model > 1 and parallel != TENSOR:
        raise BenchError(
            f"--gp_num {per_model} spreads layers over GPUs, and there is only the CPU; on CPU a"
            " model can be split with --parallel tp."
        )
