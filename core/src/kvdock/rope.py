"""Turn cached keys to other positions with the model's own rotary functions."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STATIC_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE types whose angles do not depend on the length seen so far."""

Rotate = Callable[[Tensor, Tensor, int], Tensor]
Turns = Callable[[Tensor], tuple[Tensor, Tensor]]


def make_rotation(model: nn.Module, managed: tuple[int, ...]) -> tuple[Rotate | None, str]:
    """Return ``rotate(key [b, K, N, D], delta [b, N], rank)`` and, when it is None, the reason.

    RoPE depends on relative positions only: turning a rotated key by ``delta`` more positions is
    the same as rotating the raw key at its new position.
    """
    rotary = next(
        (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None
    )
    if rotary is None:
        return None, "the model has no rotary position embedding"
    kind = getattr(rotary, "rope_type", "default")
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    if not kinds <= set(STATIC_TYPES):
        return None, f"its RoPE type {', '.join(sorted(kinds))} changes angles with the length"
    attention = _attention_modules(model)
    if any(index not in attention for index in managed):
        return None, "its attention modules carry no layer_idx"
    apply = getattr(
        sys.modules[type(attention[managed[0]]).__module__], "apply_rotary_pos_emb", None
    )
    if apply is None:
        return None, "its modeling file has no apply_rotary_pos_emb"
    per_type = "layer_type" in inspect.signature(rotary.forward).parameters
    angles = _Angles(rotary)

    def rotate(key: Tensor, delta: Tensor, rank: int) -> Tensor:
        module = attention[managed[rank]]
        if not getattr(module, "use_rope", True):
            return key
        states = key.float()
        extra = (_layer_type(module),) if per_type else ()
        cos, sin = angles(states, delta, extra)
        turned: Tensor = apply(states[:, :0], states, cos, sin)[1]  # there are no queries to turn
        return turned.to(key.dtype)

    return rotate, ""


def make_turns(model: nn.Module, managed: tuple[int, ...]) -> Turns | None:
    """Return ``turns(delta [b, N])``, cos and sin float32 [b, N, D], None where it takes more.

    They serve models all of whose layers turn one half of the whole head against the other:
    `rotate` is then ``key · cos + (−second half, first half) · sin``.
    """
    rotary = next(
        (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None
    )
    attention = _attention_modules(model)
    if rotary is None or any(index not in attention for index in managed):
        return None
    modules = [attention[index] for index in managed]
    apply = getattr(sys.modules[type(modules[0]).__module__], "apply_rotary_pos_emb", None)
    per_type = "layer_type" in inspect.signature(rotary.forward).parameters
    if apply is None or per_type or not all(getattr(m, "use_rope", True) for m in modules):
        return None
    angles = _Angles(rotary)

    def turns(delta: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles(torch.empty(0, device=delta.device), delta, ())
        return cos, sin

    dim = getattr(modules[0], "head_dim", 0)
    key, cos, sin = torch.randn(3, 1, 1, dim, generator=torch.Generator().manual_seed(0))
    low, high = key.chunk(2, dim=-1)
    halves = key * cos + torch.cat([-high, low], dim=-1) * sin
    try:
        found = apply(key[None], key[None], cos, sin)[1][0]
    except RuntimeError:  # it takes an angle per pair, not per channel
        return None
    # parameters that are offloaded lie nowhere; the frequencies stay where they are used
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("meta"))
    if device.type == "meta":
        return None
    whole = turns(torch.zeros(1, 1, dtype=torch.long, device=device))[0].shape[-1] == dim
    return turns if whole and torch.allclose(found, halves) else None


class _Angles:
    """Compute cos and sin, once where all layers turn by the same tensor ``delta``."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Tensor, Tensor]] = {}

    def __call__(self, states: Tensor, delta: Tensor, extra: tuple[str, ...]) -> Any:
        """Return float32 cos and sin, each [b, N, rotary dim], without YaRN's factor.

        They lie on the device of ``states``.
        """
        key = (states.device, *extra)
        known = self._known.get(key)
        if known is None or known[0]() is not delta:
            scale = _scaling(self._rotary, extra)
            cos, sin = self._rotary(states, delta, *extra)
            # spread over devices, the rotary module answers where its frequencies lie
            cos, sin = (x.to(states.device) / scale for x in (cos, sin))
            known = (weakref.ref(delta), cos, sin)
            self._known[key] = known
        return known[1:]


def _attention_modules(model: nn.Module) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and type(module).__name__.endswith("Attention"):
            found.setdefault(index, module)
    return found


def _layer_type(module: Any) -> str:
    kind = getattr(module, "layer_type", None)
    return str(kind if kind is not None else module.config.layer_types[module.layer_idx])


def _scaling(rotary: Any, extra: tuple[str, ...]) -> float:
    """Return the constant YaRN puts into cos and sin, so that it is not applied twice."""
    name = f"{extra[0]}_attention_scaling" if extra else "attention_scaling"
    return float(getattr(rotary, name, 1.0))
