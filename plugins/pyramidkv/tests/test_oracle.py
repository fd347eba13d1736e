"""Kept positions on random cases, through the core's own layer path, against a float64 oracle."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_pyramidkv.options import PyramidKVOptions
from kvdock_pyramidkv.policy import PyramidKVPolicy

from . import oracle

pytestmark = pytest.mark.versionless

CASES, LAYERS = 288, 5
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
    beta: float
    slots: int
    layer: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None

    def policy(self):
        options = PyramidKVOptions(
            window=self.window, kernel=self.kernel, pooling=self.pooling, beta=self.beta
        )
        return PyramidKVPolicy(options)

    def allowance(self, length):
        """Return the oracle's entries for a row of this layer."""
        if length <= self.slots:
            return self.slots
        total = LAYERS * (self.slots - self.window)
        counts = oracle.pyramid(total, LAYERS, length - self.window, self.beta)
        return counts[self.layer] + self.window

    def wanted(self, q, k):
        """Return the oracle's positions per row, and whether float32 can make every choice."""
        rows = [
            oracle.select(
                q[row, :, -length:], k[row, :, -length:], self.allowance(length), self.window,
                self.kernel, self.pooling,
            )
            for row, length in enumerate(self.lengths)
        ]  # fmt: skip
        return [positions for positions, _ in rows], all(clear for _, clear in rows)

    def draw(self):
        """Draw states until float32 can decide every choice; return them with the oracle's."""
        shape = (len(self.lengths), self.kv_heads, self.group, max(self.lengths), self.head_dim)
        for attempt in range(20):
            q, k, v = random_states(self.seed + 1000 * attempt, *shape)
            wanted, clear = self.wanted(q, k)
            if clear:
                return (q, k, v), wanted
        raise AssertionError("no clear draw in 20")


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    window, beta = rng.choice((1, 3, 8, 16)), rng.choice((1.0, 1.5, 4.0, 20.0))
    slots = window + rng.choice((20, 33, 40))
    longest = slots + {0: -1, 1: 0, 2: 1}.get(seed % 8, rng.randint(2, 110))
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    cut = longest - 1 if seed % 4 == 1 else rng.randint(1, longest - 1)
    return Case(
        seed, rng.choice((1, 2)), GROUPS[seed % 4], HEAD_DIMS[seed // 4 % 3], window,
        KERNELS[seed // 2 % 3], ("max", "avg")[seed // 12 % 2], beta, slots,
        rng.randrange(LAYERS), tuple(lengths), (cut, longest - cut) if seed % 2 else None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(CASES))
def test_kept_positions_equal_the_oracle(seed):
    case = make_case(seed)
    (q, k, v), wanted = case.draw()
    driver = LayerDriver(case.policy(), case.slots, LAYERS)
    driver.prompt(*[(q, k, v)] * LAYERS, lengths=case.lengths, chunks=case.chunks)
    assert driver.kept(case.layer) == wanted
    for row, length in enumerate(case.lengths):
        held = driver.store(case.layer).storage.row(row)
        index = torch.tensor(wanted[row]) + max(case.lengths) - length
        index = index[..., None].expand(-1, -1, case.head_dim)
        assert torch.equal(held.keys[0], k[row].gather(1, index))
        assert torch.equal(held.values[0], v[row].gather(1, index))


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [c for c in cases if any(n > c.allowance(n) for n in c.lengths)]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {c.head_dim for c in compressed if c.group == group} == set(HEAD_DIMS)
    for pooling in ("max", "avg"):
        assert {c.kernel for c in compressed if c.pooling == pooling} == set(KERNELS)
    for excess in (-1, 0, 1):
        assert sum(max(c.lengths) - c.slots == excess for c in cases) >= 10
    assert {c.layer for c in compressed} == set(range(LAYERS))
    assert sum(len(set(c.lengths)) > 1 for c in compressed) >= 40
    assert sum(c.chunks is not None for c in compressed) >= 60
    assert sum(c.chunks is not None and c.chunks[-1] == 1 for c in compressed) >= 30
