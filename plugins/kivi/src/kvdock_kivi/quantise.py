"""Asymmetric min/max quantisation, and codes in planes of 16-bit words.

Shapes: … any leading dimensions, T tokens, D channels, g group, P planes, n tokens of a plane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock_kivi.geometry import Geometry

LARGEST = 65504.0
"""The largest float16: scales and zeros beyond it could not be stored."""


def quantise_groups(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups along the last dimension: c = round(clip((x − z)/s, 0, L)).

    Statistics and quotients are float32; codes are taken with the scale and zero that are stored.
    A constant group gets codes 0. A group that holds NaN, ±inf or a number beyond float16 gets the
    scale NaN and thus reads as NaN, as the model's own attention would.

    Returns:
        codes int16 [..., g], scale and zero float16 [...].
    """
    x = x.float()
    low, high = x.amin(-1), x.amax(-1)
    sound = (x.abs() <= LARGEST).all(-1)
    low, high = low.where(sound, 0.0), high.where(sound, 0.0)
    scale = ((high - low) / levels).half()
    zero = low.half() + 0.0  # one zero only: bytes must not depend on its sign
    step = scale.float()[..., None]
    code = (x - zero.float()[..., None]) / step.where(step > 0, 1.0)
    code = code.clamp(0, levels).round().where((step > 0) & sound[..., None], 0.0)
    return code.to(torch.int16), scale.where(sound, float("nan")), zero


def quantise_keys(keys: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise keys per channel: [..., T, D] → codes [..., T, D], scale and zero [..., T/g, D]."""
    groups = keys.unflatten(-2, (-1, geometry.group)).transpose(-1, -2)
    codes, scale, zero = quantise_groups(groups, geometry.levels)
    return codes.transpose(-1, -2).flatten(-3, -2), scale, zero


def quantise_values(values: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise values per token: [..., T, D] → codes [..., T, D], scale and zero [..., T, D/g]."""
    codes, scale, zero = quantise_groups(
        values.unflatten(-1, (-1, geometry.group)), geometry.levels
    )
    return codes.flatten(-2), scale, zero


def pack(codes: Tensor, geometry: Geometry) -> Tensor:
    """Put codes [..., T, D], T whole blocks, into words int16 [..., T/(P·n), n, D].

    Word (block, i, d) holds token block·P·n + j·n + i of channel d at bits b·j, j < P.
    """
    planes = codes.int().unflatten(-2, (-1, geometry.planes, geometry.plane))
    shift = torch.arange(geometry.planes, device=codes.device, dtype=torch.int32) * geometry.bits
    words = (planes << shift[:, None, None]).sum(-3, dtype=torch.int32)
    return words.to(torch.int16)  # keeps the lower 16 bits


def unpack(words: Tensor, geometry: Geometry) -> Tensor:
    """Return the codes of `pack`, int16 [..., T, D]."""
    shift = torch.arange(geometry.planes, device=words.device, dtype=torch.int32) * geometry.bits
    planes = (words.int()[..., None, :, :] >> shift[:, None, None]) & geometry.levels
    return planes.to(torch.int16).flatten(-4, -2)


def dequantise_keys(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return s·c + z, float32 [..., T, D]."""
    scale, zero = (x.float().repeat_interleave(group, -2) for x in (scale, zero))
    return scale * codes + zero


def dequantise_values(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return s·c + z, float32 [..., T, D]."""
    scale, zero = (x.float().repeat_interleave(group, -1) for x in (scale, zero))
    return scale * codes + zero
