"""Kept positions and merged values on random cases, through the core's own layer path."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_cam.options import CaMOptions
from kvdock_cam.policy import CaMPolicy

from . import oracle

pytestmark = pytest.mark.versionless

CASES, LAYERS = 256, 2
GROUPS, HEAD_DIMS, MERGES = (1, 3, 4, 8), (64, 96, 128), (1, 2, 5, 8, 32)


@dataclass(frozen=True)
class Case:
    seed: int
    kv_heads: int
    group: int
    head_dim: int
    options: CaMOptions
    budget: int | str
    layer: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None

    def slots(self, length):
        """Return the row's allowance, worked out apart from `Budget`."""
        text = str(self.budget)
        return max(1, length * int(text[:-1]) // 100) if text.endswith("%") else int(text)

    def wanted(self, q, k, v):
        """Return the oracle's (positions, values) per row, and whether all choices were clear."""
        options, rows = self.options, []
        for row, length in enumerate(self.lengths):
            states = (x[row, :, -length:] for x in (q, k, v))
            rows.append(
                oracle.select(
                    *states, slots=self.slots(length), window=options.window, m=options.merge,
                    base=options.base, sample=options.sample, seed=options.seed,
                    layer=self.layer, scaling=self.head_dim**-0.5,
                )
            )  # fmt: skip
        return [row[:2] for row in rows], all(row[2] for row in rows)

    def draw(self):
        """Draw states until float32 can decide every choice; return them with the oracle's."""
        shape = (len(self.lengths), self.kv_heads, self.group, max(self.lengths), self.head_dim)
        for attempt in range(40):
            q, k, v = random_states(self.seed + 1000 * attempt, *shape)
            q = q * (0.3, 1.0, 2.0)[self.seed % 3]
            wanted, clear = self.wanted(q, k, v)
            if clear:
                return (q, k, v), wanted
        raise AssertionError("no clear draw in 40")


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    window = rng.choice((1, 2, 5, 8, 16))
    slots = window + rng.choice((1, 4, 9, 20))
    longest = slots + {0: -1, 1: 0, 2: 1}.get(seed % 9, rng.randint(2, 80))
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    cut = longest - 1 if seed % 4 == 1 else rng.randint(1, longest - 1)
    options = CaMOptions(
        window=window, merge=rng.choice(MERGES), base="streaming" if seed % 5 == 4 else "votes",
        sample=seed // 2 % 2 == 0, seed=rng.choice((0, 7, 2**40 + 5)),
    )  # fmt: skip
    return Case(
        seed, rng.choice((1, 2, 3)), GROUPS[seed % 4], HEAD_DIMS[seed // 4 % 3], options,
        f"{rng.choice((5, 30, 60))}%" if seed % 7 == 3 else slots, rng.randrange(LAYERS),
        tuple(lengths), (cut, longest - cut) if seed % 2 else None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(CASES))
def test_entries_equal_the_oracle(seed):
    case = make_case(seed)
    (q, k, v), wanted = case.draw()
    driver = LayerDriver(CaMPolicy(case.options), case.budget, LAYERS)
    driver.prompt(*[(q, k, v)] * LAYERS, lengths=case.lengths, chunks=case.chunks)
    assert driver.kept(case.layer) == [positions for positions, _ in wanted]
    for row, (length, (positions, values)) in enumerate(zip(case.lengths, wanted, strict=True)):
        held = driver.store(case.layer).storage.row(row)
        index = torch.tensor(positions) + max(case.lengths) - length
        index = index[..., None].expand(-1, -1, case.head_dim)
        assert torch.equal(held.keys[0], k[row].gather(1, index))
        torch.testing.assert_close(held.values[0].double(), values, rtol=1e-5, atol=1e-5)


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [c for c in cases if any(n > c.slots(n) for n in c.lengths)]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {c.head_dim for c in compressed if c.group == group} == set(HEAD_DIMS)
    for base in ("votes", "streaming"):
        kinds = {(c.options.sample, c.options.merge) for c in compressed if c.options.base == base}
        assert kinds == {(sample, m) for sample in (True, False) for m in MERGES}
    for excess in (-1, 0, 1):
        assert sum(max(c.lengths) - c.slots(max(c.lengths)) == excess for c in cases) >= 10
    assert {c.layer for c in compressed} == set(range(LAYERS))
    assert any(c.options.merge > c.slots(max(c.lengths)) for c in compressed)
    assert sum(len(set(c.lengths)) > 1 for c in compressed) >= 40
    assert sum(c.chunks is not None for c in compressed) >= 60
