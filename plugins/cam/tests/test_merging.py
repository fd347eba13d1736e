"""The merge itself: sums, probabilities and draws on hand-made inputs."""

import random

import pytest
import torch

from kvdock_cam import merging
from kvdock_cam.draws import uniform
from kvdock_cam.merging import gaps, merge_probability, merged_values, window_sums

from . import oracle


def problem(seed, b=1, kv_heads=2, n=60, d=8, c=12):
    """Return random values, attention, and kept entries with the last one among them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    values = torch.randn(b, kv_heads, n, d, generator=generator)
    attention = torch.rand(b, kv_heads, n, generator=generator) ** 4
    index = torch.tensor(
        [
            [sorted([*rng.sample(range(n - 1), c - 1), n - 1]) for _ in range(kv_heads)]
            for _ in range(b)
        ]
    )
    return values, attention, index


def merge(values, attention, index, m):
    gap = gaps(index, values.shape[2])
    weights = merge_probability(attention, index, gap, m)
    return merged_values(values, weights, index, gap, m), weights


@pytest.mark.parametrize("m", [1, 3, 8, 32, 100])
@pytest.mark.parametrize("block_bytes", [1, 1000, 2**26])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_the_merge_equals_a_double_loop(m, block_bytes, shape, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_BYTES", block_bytes)
    b, kv_heads = shape
    values, attention, index = problem(m, b, kv_heads)
    found, _ = merge(values, attention, index, m)
    for row in range(b):
        for head in range(kv_heads):
            kept = index[row, head].tolist()
            wanted = oracle.merge(
                values[row, head], attention[row, head].double().tolist(), kept, m,
                lambda position, p: p,
            )  # fmt: skip
            torch.testing.assert_close(found[row, head].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 31, 32, 33])
def test_window_sums(count):
    terms = torch.randn(2, 3, 50, 4, dtype=torch.float64)
    wanted = torch.stack([terms[:, :, i : i + count].sum(dim=2) for i in range(51 - count)], dim=2)
    assert torch.allclose(window_sums(terms, count), wanted)


def test_window_sums_do_not_cancel():
    """One huge term must not take the digits of those far from it."""
    terms = torch.ones(1, 1, 100)
    terms[..., 5] = 1e9
    assert torch.equal(window_sums(terms, 8)[..., 6:], torch.full((1, 1, 87), 8.0))


def test_one_evicted_token_reads_out_as_before():
    """Σ_k Ā_k·ΔV_k = Ā_i·V_i wherever p stays below 1 (the identity the method rests on)."""
    for seed in range(20):
        values, attention, index = problem(seed, kv_heads=1, n=13, c=12)
        (evicted,) = set(range(13)) - set(index[0, 0].tolist())
        attention[..., evicted] = 1e-3
        for m in (1, 4, 32):
            found, weights = merge(values, attention, index, m)
            if weights.max() == 1:
                continue
            kept = values.gather(2, index[..., None].expand(-1, -1, -1, 8))
            read = (attention.gather(2, index)[..., None] * (found - kept)).sum(dim=2)
            lost = attention[..., evicted, None] * values[:, :, evicted]
            torch.testing.assert_close(read, lost, rtol=1e-4, atol=1e-6)


def test_probabilities_of_degenerate_attention():
    index = torch.tensor([[[0, 2, 4]]])
    gap = gaps(index, 5)
    nothing = torch.zeros(1, 1, 5)
    assert merge_probability(nothing, index, gap, 2).tolist() == [[[0.0] * 5]]  # 0/0
    only = torch.tensor([[[0.0, 3.0, 0.0, 0.0, 0.0]]])
    assert merge_probability(only, index, gap, 2).tolist() == [[[0, 1, 0, 0, 0]]]  # x/0
    mild = torch.tensor([[[9.0, 1.0, 2.0, 5.0, 6.0]]])
    found = merge_probability(mild, index, gap, 2)[0, 0].tolist()
    assert found == pytest.approx([0, 0.25, 0, 5 / 6, 0])


def test_without_probability_nothing_changes():
    values, attention, index = problem(5)
    attention = torch.zeros_like(attention).scatter_(2, index, 1.0)
    found, _ = merge(values, attention, index, 4)
    assert torch.equal(found, values.gather(2, index[..., None].expand(-1, -1, -1, 8)))


def test_half_precision_values_are_merged_in_full():
    values, attention, index = problem(6, n=400)
    whole, _ = merge(values.bfloat16().float(), attention, index, 8)
    half, _ = merge(values.bfloat16(), attention, index, 8)
    assert torch.equal(half, whole.bfloat16())


def test_draws_equal_the_oracle():
    positions = torch.tensor([[[0, 1, 70_000], [5, 2**31, 3]]])
    for seed, layer in ((0, 0), (3, 31), (2**62, 7)):
        found = uniform(positions, seed, layer)[0].tolist()
        for head, row in enumerate(positions[0].tolist()):
            assert found[head] == [oracle.uniform(seed, layer, head, j) for j in row]


def test_draws_are_uniform_and_unrelated():
    positions = torch.arange(40_000).expand(1, 2, -1)
    draws = torch.stack([uniform(positions, seed, layer)[0] for seed in (0, 1) for layer in (0, 1)])
    draws = draws.flatten(0, 1).double()
    assert ((draws >= 0) & (draws < 1)).all()
    counts = torch.stack([torch.histc(row, 50, 0, 1) for row in draws])
    assert ((counts - 800).abs() < 6 * 800**0.5).all()
    between = torch.corrcoef(draws) - torch.eye(8, dtype=torch.float64)
    assert between.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([draws[0, :-1], draws[0, 1:]]))[0, 1]
    assert neighbours.abs() < 0.03


def test_a_part_of_the_heads_has_the_draws_of_those_heads():
    positions = torch.arange(50).expand(1, 6, 50)
    whole = uniform(positions, 3, 2)
    assert torch.equal(uniform(positions[:, 4:], 3, 2, first_head=4), whole[:, 4:])
