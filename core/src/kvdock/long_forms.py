"""Fused forms of the token-wise layers of a long prompt, on this model's instances only.

At 128K tokens the separate operations of one RMS norm move eight times the memory that the norm
needs. A form is taken only if it gives what the module itself gives, which a small case decides
when the first long prompt arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kvdock.fused import agrees, changed, gated_mlp, tokens

Form = Callable[[Tensor], Tensor]


class LongForms:
    """Find the fused form of a module, once for each kind of module.

    Args:
        kernels: the module of kernels, `kernels.step_triton`; None where there is none.
        device: the type of the devices that they run on.
    """

    def __init__(self, kernels: ModuleType | None, device: str = "cuda") -> None:
        self._kernels = kernels
        self._device = device
        self._verdicts: dict[Any, bool] = {}

    def norm(self, module: Any, states: Tensor) -> Form | None:
        """Return a norm that needs no memory beside its output, or None."""
        if self._kernels is None or not type(module).__name__.endswith("RMSNorm"):
            return None
        kernels = self._kernels

        def form(hidden: Tensor) -> Tensor:
            made: Tensor = kernels.rms_norm(hidden, module.weight, module.variance_epsilon)
            return made

        return form if self._trusted(module, form, states) else None

    def mlp(self, module: Any, states: Tensor) -> Form | None:
        """Return an MLP whose gate is one kernel, or None."""
        if self._kernels is None or not type(module).__name__.endswith("MLP"):
            return None
        form = gated_mlp(module, self._kernels)
        return form if form is not None and self._trusted(module, form, states) else None

    def _trusted(self, module: nn.Module, form: Form, states: Tensor) -> bool:
        own = type(module).__module__.startswith("transformers.") and not changed(module)
        weights = list(module.parameters())
        here = all(weight.device == states.device for weight in weights)
        if not own or not here or states.device.type != self._device or torch.is_grad_enabled():
            return False  # a kernel has no gradient
        shapes = tuple((tuple(weight.shape), weight.dtype) for weight in weights)
        kind = type(module), shapes, states.dtype, getattr(module, "variance_epsilon", None)
        if kind not in self._verdicts:
            case = tokens(states.shape[-1], states.device, states.dtype)
            self._verdicts[kind] = agrees(module, form, case, what="a long prompt")
        return self._verdicts[kind]


def long_forms() -> LongForms:
    """Return the fused forms; without Triton there are none."""
    try:
        from kvdock.kernels import step_triton
    except Exception:  # not installed, or broken: the model's own operations do the same
        return LongForms(None)
    return LongForms(step_triton)
