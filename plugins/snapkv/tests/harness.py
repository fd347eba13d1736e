"""Drive one layer of the core with random states, as a model's attention would.

Shapes: B rows, H query heads, K key/value heads, T columns, D head_dim.
"""

import torch

from kvdock.budget import Budget
from kvdock.kernels.reference import ReferenceBackend
from kvdock.layer import LayerStore
from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, ModelFacts
from kvdock_snapkv.options import SnapKVOptions
from kvdock_snapkv.policy import SnapKVPolicy


def make_store(budget, *, layers=1, **options):
    policy = SnapKVPolicy(SnapKVOptions(**options))
    plan = DockPlan(
        methods=("snapkv",),
        cache_policy=policy,
        attention_policy=None,
        budget=Budget.parse(budget),
        backend=ReferenceBackend(),
        fallback=ReferenceBackend(),
        facts=ModelFacts(layers, None),
        config=None,
        managed=tuple(range(layers)),
    )
    return LayerStore(plan, 0)


def states(seed, *, batch, kv_heads, group, columns, head_dim, dtype=torch.float32, sharpness=1.0):
    """Return random q, k, v; ``sharpness`` spreads the logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(batch, heads, columns, head_dim, generator=generator)

    q, k, v = draw(kv_heads * group) * sharpness, draw(kv_heads), draw(kv_heads)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def left_mask(lengths, columns):
    """Return the attention mask of rows padded on the left, or None when nothing is padded."""
    if all(length == columns for length in lengths):
        return None
    first = torch.tensor([columns - length for length in lengths])
    return torch.arange(columns) >= first[:, None]


def prefill(store, q, k, v, *, lengths=None, chunks=None, params=None, turn=0, past=None):
    """Feed a prompt in ``chunks`` (columns each) and return the attention outputs [B, T, H, D]."""
    batch, _, columns, head_dim = q.shape
    lengths = lengths or [columns] * batch
    mask, seen = left_mask(lengths, columns), 0
    if past is not None:
        new = torch.ones(batch, columns, dtype=torch.bool) if mask is None else mask
        mask, seen = torch.cat([past, new], dim=1), past.shape[1]
    params = params or AttentionParams(head_dim**-0.5)
    outputs, start = [], 0
    for size in chunks or [columns]:
        stop = start + size
        part = slice(start, stop)
        layout = BatchLayout(
            None if mask is None else mask[:, : seen + stop], batch, size, seen + start
        )
        outputs.append(
            store.extend(
                q[:, :, part], k[:, :, part], v[:, :, part], layout, params,
                turn=turn, last=stop == columns, prompt_columns=seen + columns,
            )
        )  # fmt: skip
        start = stop
    return torch.cat(outputs, dim=1)


def step(store, q, k, v, params=None):
    """Append one token per row."""
    return store.step(q, k, v, params or AttentionParams(q.shape[-1] ** -0.5))


def kept(store):
    """Return the kept positions as nested lists [B][K][...], empty slots left out."""
    return [
        [[p for p in head if p >= 0] for head in row]
        for row in store.storage.kept_positions().tolist()
    ]
