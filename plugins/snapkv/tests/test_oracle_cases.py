"""Kept positions on random cases, through the core's own layer path, against the float64 oracle."""

import random
from dataclasses import dataclass

import pytest
import torch

from . import oracle
from .harness import make_layer, states

pytestmark = pytest.mark.versionless

CASES = 288
GROUPS, HEAD_DIMS, KERNELS = (1, 3, 4, 8), (64, 96, 128), (1, 5, 7)


@dataclass(frozen=True)
class Case:
    seed: int
    kv_heads: int
    group: int
    head_dim: int
    window: int
    kernel: int
    pooling: str
    budget: int | str
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None

    @property
    def columns(self):
        return max(self.lengths)

    def slots(self, length):
        """Return the row's allowance, worked out apart from `Budget`."""
        text = str(self.budget)
        if text.endswith("%"):
            return max(1, length * int(text[:-1]) // 100)
        if text.endswith("B"):
            per_slot = 2 * self.head_dim * 4 * self.kv_heads * len(self.lengths)
            return max(1, int(text[:-1]) // per_slot)
        return int(text)


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    window = rng.choice((1, 2, 5, 8, 16, 40))
    slots = window + rng.choice((1, 2, 9, 20))
    longest = {0: slots - 1, 1: slots, 2: slots + 1}.get(seed % 9, slots + rng.randint(2, 90))
    if seed % 25 == 1:
        longest = rng.randint(1, window)  # the window is larger than the prompt
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    kv_heads, head_dim = rng.choice((1, 2)), HEAD_DIMS[seed % 3]
    budget = slots
    if seed % 5 == 1:
        budget = f"{rng.choice((5, 20, 50, 75, 100))}%"
    elif seed % 5 == 2:
        budget = f"{slots * 2 * head_dim * 4 * kv_heads * len(lengths) + rng.randint(0, 99)}B"
    return Case(
        seed, kv_heads, GROUPS[seed // 3 % 4], head_dim, window, KERNELS[seed // 2 % 3],
        rng.choice(("max", "avg")), budget, tuple(lengths), make_chunks(rng, longest, seed),
    )  # fmt: skip


def make_chunks(rng, columns, seed):
    """Return chunk sizes; every other chunked prompt ends in a chunk of one token."""
    if seed % 2 == 0 or columns < 3:
        return None
    left, sizes = columns - (seed % 4 == 1), []
    while left:
        sizes.append(rng.randint(1, left))
        left -= sizes[-1]
    return (*sizes, *([1] if seed % 4 == 1 else []))


def expected(case, q, k):
    """Return the oracle's kept positions per row, and whether all choices were clear."""
    rows, sure = [], True
    for row, length in enumerate(case.lengths):
        a = oracle.probabilities(
            q[row, :, -length:], k[row, :, -length:], scaling=case.head_dim**-0.5
        )
        chosen, ok = oracle.select(
            a, kv_heads=case.kv_heads, slots=case.slots(length), window=case.window,
            kernel=case.kernel, pooling=case.pooling,
        )  # fmt: skip
        rows.append(chosen)
        sure = sure and ok
    return rows, sure


def draw(case):
    """Draw states until float32 can decide every choice; returns them with the expectation."""
    for attempt in range(20):
        q, k, v = states(
            case.seed + 1000 * attempt, rows=len(case.lengths), kv_heads=case.kv_heads,
            group=case.group, columns=case.columns, head_dim=case.head_dim,
            sharpness=(0.3, 1.0, 2.0)[case.seed % 3],
        )  # fmt: skip
        rows, sure = expected(case, q, k)
        if sure:
            return q, k, v, rows
    raise AssertionError("no clear draw in 20")


@pytest.mark.parametrize("seed", range(CASES))
def test_kept_positions_equal_the_oracle(seed):
    case = make_case(seed)
    q, k, v, rows = draw(case)
    layer = make_layer(case.budget, window=case.window, kernel=case.kernel, pooling=case.pooling)
    layer.prompt((q, k, v), lengths=case.lengths, chunks=case.chunks)
    assert layer.kept() == rows
    assert_entries(layer.store(), case, k, v, rows)


def assert_entries(store, case, k, v, rows):
    """The stored keys and values are the model's own, at the kept positions."""
    for row, length in enumerate(case.lengths):
        group = store.storage.row(row)
        index = torch.tensor(rows[row]) + case.columns - length
        index = index[..., None].expand(-1, -1, case.head_dim)
        assert torch.equal(group.keys[0], k[row].gather(1, index))
        assert torch.equal(group.values[0], v[row].gather(1, index))


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [c for c in cases if any(n > c.slots(n) for n in c.lengths)]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {c.head_dim for c in compressed if c.group == group} == set(HEAD_DIMS)
    for pooling in ("max", "avg"):
        assert {c.kernel for c in compressed if c.pooling == pooling} == set(KERNELS)
    assert any(len(set(c.lengths)) > 1 and c.chunks for c in compressed)
    assert any(c.chunks and c.chunks[-1] == 1 for c in compressed)
    assert any(c.window > max(c.lengths) for c in cases)
    assert any(c.window > max(c.lengths) for c in compressed)
    assert any(c.window >= c.slots(max(c.lengths)) for c in compressed)  # a share below the window
    for excess in (-1, 0, 1):
        assert any(max(c.lengths) - c.slots(max(c.lengths)) == excess for c in cases)
    assert {type(c.budget) for c in compressed} == {int, str}
