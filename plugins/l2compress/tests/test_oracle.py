"""Kept positions on random cases, through the core's own layer path, against a float64 oracle."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_l2compress.options import L2CompressOptions
from kvdock_l2compress.policy import L2CompressPolicy

pytestmark = pytest.mark.versionless

CASES = 288
GROUPS, HEAD_DIMS = (1, 3, 4, 8), (64, 96, 128)


@dataclass(frozen=True)
class Case:
    seed: int
    kv_heads: int
    group: int
    head_dim: int
    slots: int
    recent: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None

    def states(self):
        shape = (len(self.lengths), self.kv_heads, self.group, max(self.lengths), self.head_dim)
        return random_states(self.seed, *shape)


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    slots = rng.choice((1, 2, 8, 17, 40))
    longest = {0: slots, 1: slots + 1, 2: max(1, slots - 1)}.get(
        seed % 8, slots + rng.randint(2, 99)
    )
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    cut = rng.randint(1, longest)
    chunks = (cut, longest - cut) if seed % 2 and cut < longest else None
    recent = rng.randrange(slots) if seed % 5 < 2 else 0
    return Case(
        seed, rng.choice((1, 2, 3)), GROUPS[seed % 4], HEAD_DIMS[seed // 4 % 3], slots, recent,
        tuple(lengths), chunks,
    )  # fmt: skip


def oracle(keys, slots, recent):
    """Return the kept positions of one head, keys [N, D]: plain Python on float64 norms."""
    norms = [sum(x * x for x in key) ** 0.5 for key in keys.double().tolist()]
    last = len(norms) - recent
    order = sorted(range(len(norms)), key=lambda j: (j < last, norms[j], j))
    return sorted(order[:slots])


def expected(case, k):
    """Return the oracle's positions per row and key/value head."""
    return [
        [oracle(head[-length:], case.slots, min(case.recent, length)) for head in row]
        for row, length in zip(k, case.lengths, strict=True)
    ]


@pytest.mark.parametrize("seed", range(CASES))
def test_kept_positions_equal_the_oracle(seed):
    case = make_case(seed)
    q, k, v = case.states()
    policy = L2CompressPolicy(L2CompressOptions(skip_layers=(), recent=case.recent))
    driver = LayerDriver(policy, case.slots)
    driver.prompt((q, k, v), lengths=case.lengths, chunks=case.chunks)
    wanted = expected(case, k)
    assert driver.kept() == wanted
    for row, length in enumerate(case.lengths):
        held = driver.store().storage.row(row)
        index = torch.tensor(wanted[row]) + max(case.lengths) - length
        index = index[..., None].expand(-1, -1, case.head_dim)
        assert torch.equal(held.keys[0], k[row].gather(1, index))
        assert torch.equal(held.values[0], v[row].gather(1, index))


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [case for case in cases if max(case.lengths) > case.slots]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {case.head_dim for case in compressed if case.group == group} == set(HEAD_DIMS)
    for excess in (-1, 0, 1):
        assert sum(max(case.lengths) - case.slots == excess for case in cases) >= 10
    assert sum(len(set(case.lengths)) > 1 for case in compressed) >= 40
    assert sum(case.recent > 0 for case in compressed) >= 40
    assert sum(case.chunks is not None for case in compressed) >= 60
