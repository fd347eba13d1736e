"""One layer's storage, fed with random states in any chunks."""

import torch

from kvdock.policy import AttentionParams
from kvdock.storage import RowGroup
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.storage import KiviStorage

SMALL = Geometry(2, 32, 64)
FULL_PRECISION = ("key_rest", "value_rest")


def states(seed, rows=1, kv_heads=2, group=2, tokens=80, head_dim=32, dtype=torch.float32):
    """Return q [B, H, T, D], k and v [B, K, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return [torch.randn(rows, n, tokens, head_dim, generator=generator).to(dtype) for n in heads]


def piece(keys, values, rows, start, stop, channels=None):
    """Return tokens ``start … stop`` of some rows."""
    rows = list(rows)
    shape = (len(rows), keys.shape[1], stop - start)
    positions = torch.arange(start, stop).expand(shape)
    chosen = None if channels is None else channels[rows]
    part = slice(start, stop)
    return RowGroup(
        tuple(rows), keys[rows, :, part], values[rows, :, part], positions, channels=chosen
    )


def filled(geometry, keys, values, *, capacity=None, channels=None):
    """Return a storage that got all tokens of all rows at once."""
    storage, tokens = KiviStorage(geometry), keys.shape[2]
    group = piece(keys, values, range(keys.shape[0]), 0, tokens, channels)
    storage.fill([group], capacity or tokens, ordered=True)
    return storage


def streamed(geometry, q, k, v, chunks, *, capacity=None, channels=None):
    """Return a storage fed in ``chunks``: ("turn" or "steps", tokens) each."""
    storage, at = KiviStorage(geometry), 0
    rows, tokens = range(k.shape[0]), capacity or k.shape[2]
    for kind, count in chunks:
        if storage.empty:
            group = piece(k, v, rows, 0, count, channels)
            storage.fill([group], tokens, ordered=True)
        elif kind == "turn":
            storage.append([piece(k, v, rows, at, at + count)], tokens)
        else:
            for t in range(at, at + count):
                step = slice(t, t + 1)
                storage.append_step(k[:, :, step], v[:, :, step], [t] * len(rows), tokens)
                storage.attend_step(q[:, :, step], params(k))
        at += count
    return storage


def params(keys):
    return AttentionParams(keys.shape[-1] ** -0.5)


def packed_bytes(storage):
    """Return everything that is packed, as whole numbers."""
    return {
        name: tensor.view(torch.int16)
        for name, tensor in storage.cache.tensors().items()
        if name not in FULL_PRECISION
    }
