"""`DenseStorage` against a list of (position, value) per row and head, under random operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdock.dense import DenseStorage
from kvdock.layout import BatchLayout
from kvdock.policy import AttentionParams
from kvdock.storage import RowGroup

pytestmark = pytest.mark.versionless

HEADS, DIM, BIG = 2, 4, 10_000
OPERATIONS = ("extend", "step", "release", "rows", "copy", "select")


class Model:
    """What the storage should hold: per row and head a list of (position, number)."""

    def __init__(self, batch):
        self.rows = [[[] for _ in range(HEADS)] for _ in range(batch)]
        self.tokens = [0] * batch
        self.number = 0

    def numbers(self, *shape):
        """Return fresh numbers and the keys [..., D] that carry them."""
        count = int(torch.Size(shape).numel())
        found = torch.arange(self.number, self.number + count).view(shape)
        self.number += count
        return found, found[..., None].float().expand(*shape, DIM).clone()

    def append(self, row, numbers):
        """Append numbers [K, n] to a row."""
        for head in range(HEADS):
            pairs = enumerate(numbers[head].tolist(), start=self.tokens[row])
            self.rows[row][head] += list(pairs)
        self.tokens[row] += numbers.shape[1]


def filled(draw, model):
    """Fill row by row, or all rows at once where they are equally long."""
    storage, groups = DenseStorage(), []
    lengths = draw(st.lists(st.integers(0, 6), min_size=len(model.rows), max_size=len(model.rows)))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    alike = len(set(lengths)) == 1 and draw(st.booleans())
    chunks = [tuple(range(len(lengths)))] if alike else [(row,) for row in range(len(lengths))]
    for rows in chunks:
        n = lengths[rows[0]]
        numbers, keys = model.numbers(len(rows), HEADS, n)
        position = torch.arange(n).expand(len(rows), HEADS, n)
        groups.append(RowGroup(rows, keys, -keys, position))
        for at, row in enumerate(rows):
            model.append(row, numbers[at])
    storage.fill(groups)
    return storage


def extend(draw, storage, model):
    columns = draw(st.integers(1, 4))
    cells = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor([draw(cells) for _ in model.rows])
    numbers, keys = model.numbers(len(model.rows), HEADS, columns)
    layout = BatchLayout(mask, len(model.rows), columns, 0)
    storage.extend(layout, keys, -keys, list(model.tokens))
    for row, real in enumerate(mask):
        model.append(row, numbers[row][:, real])


def step(draw, storage, model):
    numbers, keys = model.numbers(len(model.rows), HEADS, 1)
    storage.append_step(keys, -keys, list(model.tokens), max(storage.live) + 1)
    for row in range(len(model.rows)):
        model.append(row, numbers[row])


def release(draw, storage, model):
    """Release one live entry per head of some rows, a step after which a slot is open."""
    step(draw, storage, model)
    over = [draw(st.booleans()) for _ in model.rows]
    slot = torch.zeros(len(model.rows), HEADS, dtype=torch.int64)
    for row, head in [(r, h) for r in range(len(over)) for h in range(HEADS) if over[r]]:
        victim = draw(st.integers(0, len(model.rows[row][head]) - 1))
        position, _ = model.rows[row][head].pop(victim)
        held = storage.view("position")[row, head].tolist()
        slot[row, head] = held.index(position)
    if any(over):
        storage.release(slot, over)


def select(draw, storage, model):
    last = len(model.rows) - 1
    order = draw(st.lists(st.integers(0, last), min_size=1, max_size=4))
    storage.select_rows(torch.tensor(order), order)
    model.rows = [[list(head) for head in model.rows[row]] for row in order]
    model.tokens = [model.tokens[row] for row in order]


def rows(draw, storage, model):
    check_rows(storage, model)


def check_rows(storage, model):
    """Reading a row closes the holes and gives its entries in order."""
    for index, heads in enumerate(model.rows):
        group = storage.row(index)
        found = [
            list(zip(p.tolist(), k[:, 0].long().tolist(), strict=True))
            for p, k in zip(group.positions[0], group.keys[0], strict=True)
        ]
        assert found == heads
        assert torch.equal(group.values, -group.keys)


def check(storage, model):
    """Compare what can be read without changing the storage."""
    assert storage.live == [len(heads[0]) for heads in model.rows]
    kept = storage.kept_positions()
    widest = max(storage.live)
    for row, heads in enumerate(model.rows):
        for head, entries in enumerate(heads):
            positions = [position for position, _ in entries]
            padding = [-1] * (widest - len(entries))
            assert sorted(kept[row, head].tolist()) == sorted(positions + padding)
            assert kept[row, head, : len(entries)].tolist() == positions
    for tensor in storage.table.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def check_attention(storage, model):
    if min(storage.live) == 0:
        return
    query = torch.zeros(len(model.rows), 2 * HEADS, 1, DIM)
    output = storage.attend_step(query, AttentionParams(1.0))
    for row, heads in enumerate(model.rows):
        for head in range(2 * HEADS):
            numbers = [float(number) for _, number in heads[head // 2]]
            expected = -sum(numbers) / len(numbers)
            assert abs(output[row, 0, head, 0].item() - expected) < 1e-3 * BIG


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_sequence_of_operations(data):
    model = Model(data.draw(st.integers(1, 3)))
    storage = filled(data.draw, model)
    check(storage, model)
    for name in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=8)):
        if name == "copy":
            stay = [storage.row(row) for row in range(len(model.rows))]
            storage.fill(stay)
        else:
            globals()[name](data.draw, storage, model)
        check(storage, model)
        check_attention(storage, model)
    check_rows(storage, model)


def test_policy_state_moves_with_its_entries():
    storage, (numbers, keys) = DenseStorage(), Model(2).numbers(2, HEADS, 3)
    position = torch.arange(3).expand(2, HEADS, 3)
    storage.fill([RowGroup((0, 1), keys, -keys, position, {"mass": numbers.float()})])
    storage.append_step(keys[:, :, :1], -keys[:, :, :1], [3, 3], 4)
    assert storage.slot_state()["mass"][..., 3].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    storage.release(torch.tensor([[0, 1], [2, 3]]), [True, True])
    first, second = storage.row(0), storage.row(1)
    assert first.positions[0].tolist() == [[1, 2, 3], [0, 2, 3]]
    assert first.slot_state["mass"][0].tolist() == [[1.0, 2.0, 0.0], [3.0, 5.0, 0.0]]
    assert second.slot_state["mass"][0].tolist() == [[6.0, 7.0, 0.0], [9.0, 10.0, 11.0]]


def test_a_view_is_stored_as_a_copy_of_its_own_size():
    keys = torch.randn(1, HEADS, 100, DIM)
    part = keys[:, :, 90:]
    storage = DenseStorage()
    storage.fill([RowGroup((0,), part, part, torch.arange(10).expand(1, HEADS, 10))])
    assert storage.nbytes == 2 * part.numel() * 4
    assert storage.state_nbytes == HEADS * 10 * 4
