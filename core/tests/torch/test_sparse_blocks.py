"""Block lists: their grid, the way to a mask and back, density, and what is refused."""

import pytest
import torch

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import (
    BlockGrid,
    BlockLists,
    all_blocks,
    check_lists,
    density,
    lists_from_mask,
    mask_from_lists,
)

pytestmark = pytest.mark.versionless


def causal(grid):
    row = torch.arange(grid.rows)[:, None] + grid.first
    return torch.arange(grid.key_blocks) <= row


@pytest.mark.parametrize(
    ("queries", "keys", "first", "rows", "blocks"),
    [
        (1, 1, 0, 1, 1),
        (128, 128, 0, 1, 1),
        (129, 129, 0, 2, 2),
        (1, 129, 1, 1, 2),
        (128, 256, 1, 1, 2),
        (129, 256, 0, 2, 2),
        (100, 1000, 7, 1, 8),
        (105, 1000, 6, 2, 8),
    ],
)
def test_grid(queries, keys, first, rows, blocks):
    grid = BlockGrid(queries, keys)
    assert (grid.first, grid.rows, grid.key_blocks) == (first, rows, blocks)
    assert grid.causal_blocks == int(causal(grid).sum())


def test_mask_and_back():
    mask = torch.rand(2, 3, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 0] = False
    mask[0, 0, 1] = True
    lists = lists_from_mask(mask, 16)
    assert (lists.count.dtype, lists.index.dtype, lists.block) == (torch.int32, torch.int32, 16)
    assert torch.equal(lists.count, mask.sum(-1).int())
    for place in [(0, 0, 0), (0, 0, 1), (1, 2, 4)]:
        found = lists.index[place][: lists.count[place]]
        assert torch.equal(found.long(), mask[place].nonzero()[:, 0])
    assert lists.index.min() >= 0
    assert lists.index.max() < 9
    assert torch.equal(mask_from_lists(lists, 9), mask)


def test_entries_past_the_count_do_not_matter():
    lists = BlockLists(
        torch.tensor([[[2, 1]]]).int(), torch.tensor([[[[1, 2, 0], [0, 0, 0]]]]).int()
    )
    expected = torch.tensor([[[[False, True, True], [True, False, False]]]])
    assert torch.equal(mask_from_lists(lists, 3), expected)


@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (130, 1000), (1, 300)])
def test_density(queries, keys):
    grid = BlockGrid(queries, keys)
    full = all_blocks(grid, 2, 3, "cpu")
    assert torch.equal(mask_from_lists(full, grid.key_blocks)[1, 2], causal(grid))
    assert torch.equal(density(full, queries, keys), torch.ones(2, 3))
    mask = causal(grid).expand(1, 2, -1, -1).clone()
    mask[0, 1, :, 0] = False
    expected = 1 - grid.rows / grid.causal_blocks
    found = density(lists_from_mask(mask), queries, keys)
    torch.testing.assert_close(found, torch.tensor([[1.0, expected]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: BlockLists(x.count[:, :, 1:], x.index, x.block), r"expected \(1, 4, 3\)"),
        (lambda x: BlockLists(x.count, x.index[:, :2], x.block), r"expected \(1, 4, 3\)"),
        (lambda x: BlockLists(x.count, x.index, 64), "blocks of 64"),
        (lambda x: BlockLists(x.count, x.index.long(), x.block), "torch.int64; expected"),
        (lambda x: BlockLists(x.count, x.index, 96), "block is 96; expected a power of two"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, message):
    lists = all_blocks(BlockGrid(300, 300), 1, 4, "cpu")
    query, key = torch.zeros(1, 4, 300, 8), torch.zeros(1, 2, 300, 8)
    check_lists(lists, query, key)
    with pytest.raises(UnsupportedError, match=message):
        check_lists(change(lists), query, key)
