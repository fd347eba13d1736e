"""KV-cache compression and sparse prefill attention for Hugging Face LLMs, as small packages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvdock.budget import Budget
from kvdock.errors import KVDockError
from kvdock.hookspecs import SPEC_VERSION, hookimpl
from kvdock.method import Capabilities, Method, Needs, Paper
from kvdock.options import Options, option
from kvdock.registry import Host, default_host

if TYPE_CHECKING:
    from kvdock.attach import Dock

__version__ = "0.1.0"
__all__ = [
    "SPEC_VERSION",
    "Budget",
    "Capabilities",
    "Host",
    "KVDockError",
    "Method",
    "Needs",
    "Options",
    "Paper",
    "attach",
    "available",
    "default_host",
    "hookimpl",
    "option",
]


def available() -> list[str]:
    """List the ids of the installed methods; imports none of them."""
    return default_host().available()


def attach(
    model: Any,
    methods: str | Sequence[Any],
    *,
    budget: int | str | Budget | None = None,
    backend: str | None = None,
    graph: str | bool = "auto",
    slice_above: int | None = 16384,
    **options: Any,
) -> Dock:
    """Compress a transformers model's cache, or make its prefill sparse, until the dock is left.

    Args:
        methods: an id, ids joined by "+", or a list of ids or configured policies.
        budget: slots (2048), a share of the prompt ("25%") or bytes ("1GiB"); None takes the
            method's default.
        backend: dense attention of the prefill; None keeps the model's own (so that prefill logits
            stay bit-identical), "auto" takes the fastest usable one. With sparse prefill it names
            that kernel, and None takes the fastest.
        graph: capture the decode step as a CUDA graph: "auto" where possible, True or raise.
        slice_above: prompts longer than this run token-wise layers (MLP, norms) in slices, and with
            Triton as fused kernels, which may differ in the last bit; None never does.
        **options: the method's options; for several methods also "method.option".
    """
    from kvdock.attach import attach as implementation

    return implementation(
        model,
        methods,
        budget=budget,
        backend=backend,
        graph=graph,
        slice_above=slice_above,
        **options,
    )


class _Package(ModuleType):
    """This package; importing its submodule `attach` must not hide the function `attach`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "attach" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
