"""Run token-wise layers of long prompts in slices along the sequence.

At 128K tokens the intermediates of one MLP hold 10 GiB, far more than attention; a token-wise
layer gives the same result slice by slice. Where a fused form is at hand it takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdock.long_forms import LongForms, long_forms

SLICE = 8192
"""Tokens per slice."""


@contextmanager
def sliced(model: nn.Module, above: int | None) -> Iterator[None]:
    """Slice the MLPs and norms of decoder layers for inputs longer than ``above`` tokens.

    The ``forward`` of the instances is replaced and given back on exit; no class is touched.
    """
    if above is None:
        yield
        return
    modules = list(token_wise(model))
    before = [module.__dict__.get("forward") for module in modules]
    forms = long_forms()
    for module in modules:
        module.forward = _slicing(module, forms, above)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def token_wise(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that map each token [hidden] on its own: gated MLPs and RMS norms."""
    for module in model.modules():
        name = type(module).__name__
        gated = name.endswith("MLP") and hasattr(module, "down_proj")
        if gated or name.endswith("RMSNorm"):
            yield module


def _slicing(module: nn.Module, forms: LongForms, above: int) -> Callable[..., Any]:
    forward = module.forward

    def sliced_forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        plain = isinstance(hidden_states, Tensor) and hidden_states.dim() == 3
        if not plain or args or kwargs or hidden_states.shape[1] <= above:
            return forward(hidden_states, *args, **kwargs)
        norm = forms.norm(module, hidden_states)
        if norm is not None:
            return norm(hidden_states)
        run = forms.mlp(module, hidden_states) or forward
        output: Tensor | None = None
        for start in range(0, hidden_states.shape[1], SLICE):
            part = run(hidden_states[:, start : start + SLICE])
            if output is None:
                shape = (*hidden_states.shape[:2], part.shape[-1])
                output = torch.empty(shape, dtype=part.dtype, device=part.device)
            output[:, start : start + SLICE] = part
        return output

    sliced_forward.__wrapped__ = forward  # type: ignore[attr-defined]
    return sliced_forward
