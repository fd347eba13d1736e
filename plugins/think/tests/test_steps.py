"""Steps in fixed shapes leave the entries of eager steps, and the host can go on from them."""

import pytest
import torch

from kvdock.policy import AttentionParams
from kvdock.storage import RowGroup
from kvdock_think.options import ThinKOptions
from kvdock_think.policy import ThinKPolicy

HEADS, DIM = 2, 32
PARAMS = AttentionParams(DIM**-0.5)


def groups(lengths, channels, seed):
    torch.manual_seed(seed)
    return [
        RowGroup(
            (row,), torch.randn(1, HEADS, n, DIM), torch.randn(1, HEADS, n, DIM),
            (3 * torch.arange(n)).expand(1, HEADS, n),
            channels=None if channels is None else channels[row : row + 1],
        )
        for row, n in enumerate(lengths)
    ]  # fmt: skip


def filled(lengths, recent, block, *, ordered):
    policy = ThinKPolicy(ThinKOptions(recent=recent, block=block))
    torch.manual_seed(0)
    shape = (len(lengths), HEADS, DIM)
    channels = torch.rand(shape).topk(policy.kept_channels(DIM)).indices.sort().values
    storage = policy.make_storage()
    storage.fill(groups(lengths, channels, 1), max(lengths), ordered=ordered)
    return storage


def walk(eager, fixed, count, seed):
    """Take steps both ways, with a growth of room at the start; return the largest difference."""
    capacity, rows = max(fixed.live) + count + 3, len(fixed.live)
    steps, worst = fixed.freeze(capacity), 0.0
    for row, live in enumerate(fixed.live):  # what was never written must not matter
        fixed.held.keys[row, :, live:] = fixed.held.values[row, :, live:] = float("nan")
    before = torch.tensor(fixed.live, dtype=torch.int32)
    positions = torch.tensor(fixed.live) + 500
    torch.manual_seed(seed)
    for _ in range(count):
        query = torch.randn(rows, 2 * HEADS, 1, DIM)
        key, value = torch.randn(rows, HEADS, 1, DIM), torch.randn(rows, HEADS, 1, DIM)
        eager.append_step(key, value, positions.tolist(), capacity)
        wanted = eager.attend_step(query, PARAMS)
        steps.append(key, value, positions, before)
        before, positions = before + 1, positions + 1
        found = steps.attend(query, before, PARAMS)
        fixed.advance()
        assert found.shape == wanted.shape
        worst = max(worst, (found - wanted).abs().max().item())
    return worst


def same(eager, fixed):
    assert eager.live == fixed.live and eager.held.start == fixed.held.start
    for row in range(len(eager.live)):
        one, other = eager.row(row), fixed.row(row)
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        assert torch.equal(one.positions, other.positions)


@pytest.mark.parametrize(("recent", "block"), [(4, 3), (0, 5), (2, 1), (60, 128)])
@pytest.mark.parametrize("ordered", [True, False])
def test_fixed_steps_leave_the_entries_of_eager_steps(recent, block, ordered):
    lengths = (21, 1, 9)
    eager, fixed = (filled(lengths, recent, block, ordered=ordered) for _ in range(2))
    assert walk(eager, fixed, 15, 2) < 1e-5
    same(eager, fixed)
    assert walk(eager, fixed, 12, 3) < 1e-5
    same(eager, fixed)
    for storage in (eager, fixed):  # the host goes on: a turn, other rows, a step
        storage.append(groups((0, 7, 4), None, 4), 80)
        order = [1, 0, 2, 1]
        storage.select_rows(torch.tensor(order), order)
        torch.manual_seed(5)
        new = [torch.randn(4, HEADS, 1, DIM) for _ in range(2)]
        storage.append_step(*new, [600, 601, 602, 600], 80)
    same(eager, fixed)
    assert walk(eager, fixed, 9, 6) < 1e-5
    same(eager, fixed)
    if block < 128:
        assert min(fixed.held.start) > 0
