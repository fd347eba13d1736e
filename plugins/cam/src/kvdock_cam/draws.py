"""Random numbers that belong to an entry, not to a generator's state.

A draw is a hash of (seed, layer, key/value head, position): the same in any batch, padding, order
of rows and number of forwards, and without touching torch's global generators.
"""

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(positions: Tensor, seed: int, layer: int, first_head: int = 0) -> Tensor:
    """Return one float32 in [0, 1) for every entry, in steps of 2⁻²⁴.

    Args:
        positions: int64 [b, K, N].
        first_head: the model's number of the first of the K heads.
    """
    last = first_head + positions.shape[1]
    heads = torch.arange(first_head, last, device=positions.device)[None, :, None]
    stream = _signed((seed * _STEP + layer) * _FIRST)
    return _shifted(_mixed(positions + (heads * _signed(_SECOND) + stream)), 40).float() * 2.0**-24


def _mixed(state: Tensor) -> Tensor:
    """Scramble 64-bit integers, one to one (the finaliser of SplitMix64)."""
    state = state + _signed(_STEP)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right without carrying the sign on."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the low 64 bits as torch stores them."""
    low = number & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low
