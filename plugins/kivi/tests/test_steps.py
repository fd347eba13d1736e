"""Steps in fixed shapes leave the bytes of eager steps, and the host can go on from them."""

import pytest
import torch

from kvdock_kivi.geometry import Geometry
from kvdock_kivi.storage import KiviStorage

from .harness import params, piece, states


def pair(geometry, lengths, capacity, channels, *, ordered):
    """Return two storages that hold the same rows, and states for steps."""
    _, k, v = states(20, rows=len(lengths), tokens=max(lengths))
    pair = []
    for _ in range(2):
        storage = KiviStorage(geometry)
        groups = [piece(k, v, [row], 0, n, channels) for row, n in enumerate(lengths)]
        storage.fill(groups, capacity, ordered=ordered)
        pair.append(storage)
    return pair


def walk(eager, fixed, lengths, count, capacity, seed):
    """Take steps both ways; return the largest difference of their outputs."""
    q, k, v = states(seed, rows=len(lengths), tokens=count)
    steps, worst = fixed.freeze(capacity), 0.0
    before = torch.tensor(fixed.live, dtype=torch.int32)
    positions = torch.tensor(lengths) + 500
    for t in range(count):
        query, key, value = (x[:, :, t : t + 1] for x in (q, k, v))
        eager.append_step(key, value, positions.tolist(), capacity)
        wanted = eager.attend_step(query, params(k))
        steps.append(key, value, positions, before)
        before, positions = before + 1, positions + 1
        found = steps.attend(query, before, params(k))
        fixed.advance()
        assert found.shape == wanted.shape
        worst = max(worst, (found - wanted).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("geometry", "lengths", "capacity"),
    [
        (Geometry(2, 32, 32), (95, 31, 5), 140),
        (Geometry(4, 32, 64), (64, 1, 63), 120),
        (Geometry(2, 32, 128), (70, 20, 3), 115),  # nothing can be packed
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [False, True])
def test_fixed_steps_leave_the_bytes_of_eager_steps(geometry, lengths, capacity, cut, monkeypatch):
    monkeypatch.setattr("kvdock_kivi.attention.TILE", 64)
    channels = torch.arange(0, 32, 2).expand(3, 2, 16).contiguous() if cut else None
    eager, fixed = pair(geometry, lengths, capacity, channels, ordered=cut)
    assert walk(eager, fixed, lengths, 40, capacity, 21) < 1e-5
    same(eager, fixed)
    # a growth step, then steps that the host leads, then a turn
    assert walk(eager, fixed, [n + 40 for n in lengths], 30, capacity + 90, 22) < 1e-5
    same(eager, fixed)
    _, k, v = states(23, rows=3, tokens=70)
    for storage in (eager, fixed):
        storage.append_step(k[:, :, :1], v[:, :, :1], [900, 901, 902], capacity + 90)
        storage.attend_step(k.repeat_interleave(2, 1)[:, :, :1], params(k))
        storage.append([piece(k, v, [1], 0, 65), piece(k, v, [0, 2], 0, 0)], capacity + 190)
        storage.select_rows(torch.tensor([1, 0]), [1, 0])
    same(eager, fixed)
    if geometry.residual < 128:
        assert fixed.cache.key_codes.count_nonzero() and fixed.cache.value_codes.count_nonzero()


def same(eager, fixed):
    """Compare every tensor bit for bit, and what the host knows."""
    assert eager.live == fixed.live
    for name, tensor in eager.tensors().items():
        assert torch.equal(fixed.tensors()[name], tensor), name
    assert torch.equal(eager.kept_positions(), fixed.kept_positions())


def test_values_no_number_can_hold_are_marked_as_eager_steps_mark_them():
    eager, fixed = pair(Geometry(2, 32, 32), (40, 31), 80, None, ordered=True)
    _, k, v = states(24, rows=2, tokens=1)
    k[0, 0, 0, 3], v[1, 1, 0, 5] = float("inf"), float("nan")
    steps = fixed.freeze(80)
    eager.append_step(k, v, [0, 0], 80)
    eager.attend_step(k.repeat_interleave(2, 1), params(k))
    before = torch.tensor(fixed.live, dtype=torch.int32)
    steps.append(k, v, torch.zeros(2, dtype=torch.int64), before)
    steps.attend(k.repeat_interleave(2, 1), before + 1, params(k))
    fixed.advance()
    walk(eager, fixed, (41, 32), 33, 80, 25)
    for name, tensor in eager.cache.tensors().items():
        kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(fixed.cache.tensors()[name].view(kind), tensor.view(kind)), name
    assert eager.cache.key_scale.isnan().any() and eager.cache.value_scale.isnan().any()
