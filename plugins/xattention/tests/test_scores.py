"""Block masses against antidiagonals summed one by one, in float64."""

import pytest
import torch

from kvdock_xattention.grid import TileGrid
from kvdock_xattention.reference import SCORE_BYTES, block_mass

from . import oracle


def draw(heads, kv_heads, q, n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, q, heads, d, generator=generator, dtype=torch.float64).transpose(1, 2)
    key = torch.randn(1, n, kv_heads, d, generator=generator, dtype=torch.float64).transpose(1, 2)
    return query * 2, key


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_the_oracle_sums_antidiagonals(stride):
    query, key = (x[0, 0] for x in draw(1, 1, 53, 53, 64))
    found = oracle.tile_scores(query, key, stride)
    for m in range(len(found)):
        for n in range(len(found)):
            wanted = 0.0
            for i in range(stride):
                row, column = m * stride + stride - 1 - i, n * stride + i
                if row < 53 and column < 53:
                    wanted += float(query[row] @ key[column])
            assert abs(found[m, n] - wanted) < 1e-10


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize(("n", "d"), [(1000, 64), (517, 128), (128, 64), (5, 128)])
def test_masses_are_those_of_the_oracle_for_every_head_of_a_group(stride, n, d):
    query, key = draw(4, 2, n, n, d)
    grid = TileGrid(n, n, stride)
    found = block_mass(query, key, d**-0.5, grid)
    for head in range(4):
        wanted = oracle.block_mass(query[0, head], key[0, head // 2], d**-0.5, stride, 128)
        assert torch.allclose(found[0, head], wanted, rtol=0, atol=1e-10)
    tiles = torch.full((grid.blocks.rows,), grid.per_block, dtype=torch.float64)
    tiles[-1] = grid.key_tiles - grid.per_block * (grid.blocks.rows - 1)
    assert torch.allclose(found.sum(-1), tiles.expand(1, 4, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("q", [1, 3, 130, 257, 293])
def test_a_chunk_fills_the_tiles_of_the_absolute_grid(q):
    query, key = draw(2, 1, q, 300, 64)
    found = block_mass(query, key, 0.125, TileGrid(q, 300, 8))
    for head in range(2):
        wanted = oracle.block_mass(query[0, head], key[0, 0], 0.125, 8, 128)
        assert torch.allclose(found[0, head], wanted, rtol=0, atol=1e-10)


def test_the_size_of_a_block_of_scores_changes_nothing(monkeypatch):
    query, key = draw(2, 1, 700, 700, 64)
    grid = TileGrid(700, 700, 4)
    whole = block_mass(query, key, 0.125, grid)
    assert whole.numel() * grid.per_block**2 * 8 < SCORE_BYTES
    monkeypatch.setattr("kvdock_xattention.reference.SCORE_BYTES", 1)
    assert torch.allclose(block_mass(query, key, 0.125, grid), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    query, key = draw(2, 1, 300, 300, 64)
    grid = TileGrid(300, 300, 8)
    query, key = query.to(dtype), key.to(dtype)
    found = block_mass(query, key, 0.125, grid)
    assert found.dtype == torch.float32
    exact = block_mass(query.double(), key.double(), 0.125, grid)
    assert (found - exact).abs().max() < 1e-4


def test_rows_of_a_batch_do_not_meet():
    pairs = [draw(2, 1, 200, 260, 64, seed) for seed in range(3)]
    query, key = (torch.cat(x) for x in zip(*pairs, strict=True))
    grid = TileGrid(200, 260, 8)
    found = block_mass(query, key, 0.125, grid)
    for row, pair in enumerate(pairs):
        assert torch.allclose(found[row], block_mass(*pair, 0.125, grid)[0], rtol=0, atol=1e-12)
