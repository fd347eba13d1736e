"""Find the interpreter of vLLM's environment."""

from __future__ import annotations

import os
from pathlib import Path

from kvdock_bench.errors import BenchError

VARIABLE = "KVDOCK_VLLM_PYTHON"
_CHECKOUT = Path(__file__).resolve().parents[4]
NOX = _CHECKOUT / ".nox" / "vllm-env" / "bin" / "python"


def find_python(given: str | None) -> Path:
    """Return the interpreter: the flag's, else the variable's, else that of the nox session."""
    for name, value in (("--vllm_python", given), (VARIABLE, os.environ.get(VARIABLE))):
        if value:
            # no resolve(): a link into another installation is what makes it this environment's
            path = Path(value).expanduser().absolute()
            if not (path.is_file() and os.access(path, os.X_OK)):
                raise BenchError(f"{name} is {value!r}, which is no program that can be run.")
            return path
    if NOX.is_file():
        return NOX
    raise BenchError(
        "--server vllm runs vLLM in an environment of its own, and none was found. In a checkout, "
        "nox -s vllm-env makes it; elsewhere install envs/vllm/cpu.in or gpu.in into a virtual "
        f"environment and name its interpreter with --vllm_python or {VARIABLE}."
    )
