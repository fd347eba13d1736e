"""What `kvdock doctor` examines: versions, devices, backends, memory, the contract of a method."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from rich.console import Console
from rich.text import Text

from kvdock.cli_estimate import Request, print_estimate
from kvdock.errors import UnsupportedError
from kvdock.method import Method
from kvdock.registry import Loaded, default_host

REQUIRED = ("torch", "transformers")
OPTIONAL = (
    "accelerate",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "flashinfer-python",
    "kvdock-bench",
)
INSTALL = 'pip install "kvdock[hf]"'


def examine(
    out: Console,
    method: str | None = None,
    request: Request | None = None,
    *,
    contract: bool = True,
) -> bool:
    """Print the report and return whether everything needed works.

    Args:
        method: an id, or ids joined by "+"; only what concerns it counts then.
        request: what memory to estimate. contract: run the method's contract checks.
    """
    # an unknown method is an error before anything slow happens
    ids = [default_host().load(part.strip()).id for part in method.split("+")] if method else []
    findings = [
        _section(out, "Versions", _versions),
        _section(out, "Devices", _devices),
        _section(out, "Attention backends", _backends),
        _section(out, "Sparse attention backends", _sparse_backends),
        _section(out, "Methods", lambda: _methods(ids)),
    ]
    name = "+".join(ids)
    if request is not None:
        if _try_import("kvdock.estimate") is None:
            raise UnsupportedError(f"an estimate needs torch and transformers; try: {INSTALL}")
        print_estimate(out, request, name or None)
    if ids and contract:
        findings.append(_section(out, f"Contract of {name}", lambda: _contract(name)))
    return all(findings)


Finding = tuple[str, bool | None, str]
"""A name; whether it is well, None when that is a matter of taste; what was found."""


def _section(out: Console, title: str, examine: Callable[[], Iterable[Finding]]) -> bool:
    out.print(Text(title), style="bold")
    well = True
    marks = {True: ("ok", "green"), False: ("FAIL", "red"), None: ("-", "dim")}
    for name, state, message in _findings(examine):
        mark, style = marks[state]
        line = Text(f"  {mark:<5}", style=style)
        line.append(f"{name:<22} {message}", style="default")
        out.print(line)
        well = well and state is not False
    return well


def _findings(examine: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    """Yield what is found; that the examination itself fails is a finding too."""
    try:
        yield from examine()
    except Exception as error:
        yield "error", False, f"{type(error).__name__}: {error}"


def _versions() -> Iterable[Finding]:
    yield "python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "kvdock", True, version("kvdock")
    for name in REQUIRED:
        yield name, *_required(name)
    for name in OPTIONAL:
        found = _version(name)
        yield name, True if found else None, found or "not installed"


def _required(name: str) -> tuple[bool, str]:
    found = _version(name)
    if found is None:
        return False, f"not installed; try: {INSTALL}"
    try:
        importlib.import_module(name)
    except Exception as error:
        return False, f"{found}, but importing it fails: {type(error).__name__}: {error}"
    return True, f"{found} (supported: {_range(name)})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _range(name: str) -> str:
    """Read the supported range from kvdock's own metadata, the only place that states it."""
    for requirement in requires("kvdock") or ():
        distribution, _, _ = requirement.partition(";")
        if distribution.startswith(name):
            return distribution.removeprefix(name).strip()
    return "any"


def _devices() -> Iterable[Finding]:
    yield "cpu", True, f"{os.cpu_count()} logical cores"
    torch = _try_import("torch")
    if torch is None:
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        found = f"{facts.name}, {memory:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        yield f"cuda:{index}", True, found
    if torch.backends.mps.is_available():
        yield "mps", True, "available"


def _backends() -> Iterable[Finding]:
    return _probed("kvdock.kernels", "probe_backends")


def _sparse_backends() -> Iterable[Finding]:
    return _probed("kvdock.kernels.sparse", "probe_sparse_backends")


def _probed(module: str, probe: str) -> Iterable[Finding]:
    kernels = _try_import(module) if _try_import("torch") else None
    if kernels is None:
        return [("none", None, f"torch is missing; try: {INSTALL}")]
    return [
        (name, True if usable else None, reason or "usable")
        for name, usable, reason in getattr(kernels, probe)()
    ]


def _methods(ids: Sequence[str] = ()) -> Iterable[Finding]:
    """Tell of the methods named, or of all: one that is broken is no matter of its neighbours."""
    host = default_host()
    methods, failed = Loaded([host.load(id) for id in ids], {}) if ids else host.load_all()
    for method in methods:
        sources = ", ".join(host.sources(method.id)) or "this process"
        reason = _unusable(method)
        yield method.id, None if reason else True, f"{sources}{reason}"
    for id, reason in failed.items():
        yield id, False, reason
    if not methods and not failed:
        yield "none", None, "try: pip install kvdock-snapkv"


def _unusable(method: Method) -> str:
    """Say why a method cannot run at its best here, "" where it can."""
    torch = _try_import("torch")
    if torch is None:
        return f": torch is missing; try: {INSTALL}"
    if method.needs.gpu and not torch.cuda.is_available():
        return ": needs a GPU, there is none"
    missing = [name for name in method.needs.extras if importlib.util.find_spec(name) is None]
    if missing and torch.cuda.is_available():
        return f": its kernels lack {', '.join(missing)}, so plain torch does their work"
    return ""


def _contract(name: str) -> Iterable[Finding]:
    testing = _try_import("kvdock.testing")
    if testing is None:
        yield "not run", False, f"torch or transformers is missing; try: {INSTALL}"
    else:
        yield from testing.outcomes(name)


def _try_import(name: str) -> Any:
    """Import a module that torch, or its absence, may keep from working."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
