"""Kept positions on random cases, through the core's own layer path, against a float64 oracle."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_h2o.options import H2OOptions
from kvdock_h2o.policy import SCORE, H2OPolicy

from . import oracle

pytestmark = pytest.mark.versionless

CASES = 264
GROUPS, HEAD_DIMS = (1, 3, 4, 8), (64, 96, 128)


@dataclass(frozen=True)
class Case:
    seed: int
    kv_heads: int
    group: int
    head_dim: int
    budget: int | str
    options: dict
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None
    steps: int

    def slots(self, length):
        """Return the row's allowance, worked out apart from `Budget`."""
        if isinstance(self.budget, int):
            return self.budget
        return max(1, length * int(self.budget[:-1]) // 100)


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    slots = rng.choice((2, 3, 8, 17, 40))
    longest = {0: max(1, slots - 1), 1: slots, 2: slots + 1}.get(
        seed % 9, slots + rng.randint(2, 90)
    )
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    kind = seed % 5
    first = rng.randrange(1, slots)
    options = {1: {"recent": first}, 2: {"heavy": first}}.get(kind, {})
    if kind == 3:
        options = {"heavy": first, "recent": slots - first}
    budget = f"{rng.choice((5, 20, 50, 80))}%" if kind == 4 else slots
    cut = rng.randint(1, longest)
    chunks = (cut, longest - cut) if seed % 2 and cut < longest else None
    return Case(
        seed, rng.choice((1, 2)), GROUPS[seed % 4], HEAD_DIMS[seed // 4 % 3], budget, options,
        tuple(lengths), chunks, rng.choice((0, 3)),
    )  # fmt: skip


def draw(case, attempt):
    shape = (len(case.lengths), case.kv_heads, case.group)
    columns = max(case.lengths) + case.steps
    q, k, v = random_states(case.seed + 1000 * attempt, *shape, columns, case.head_dim)
    return q * (0.3, 1.0, 2.0)[case.seed % 3], k, v


def expected(case, q, k):
    """Return the oracle's positions and scores per row and head, and whether all were clear."""
    columns, found, sure = max(case.lengths), [], True
    for row, length in enumerate(case.lengths):
        _, recent = oracle.halves(case.slots(length), **case.options)
        heads = []
        for head in range(case.kv_heads):
            one = oracle.NaiveHead(case.slots(length), recent, scaling=case.head_dim**-0.5)
            group = q[row, head * case.group : (head + 1) * case.group]
            parts = [slice(columns - length, columns)]
            parts += [slice(columns + i, columns + i + 1) for i in range(case.steps)]
            for part in parts:
                one.feed(group[:, part], k[row, head, part])
            heads.append(one)
            sure = sure and one.sure
        found.append(heads)
    return found, sure


@pytest.mark.parametrize("seed", range(CASES))
def test_kept_positions_and_scores_equal_the_oracle(seed):
    case = make_case(seed)
    for attempt in range(20):  # until float32 can decide every choice
        q, k, v = draw(case, attempt)
        wanted, sure = expected(case, q, k)
        if sure:
            break
    assert sure
    driver = LayerDriver(H2OPolicy(H2OOptions(**case.options)), case.budget)
    prompt = max(case.lengths)
    driver.prompt(
        tuple(x[:, :, :prompt] for x in (q, k, v)), lengths=case.lengths, chunks=case.chunks
    )
    for i in range(prompt, prompt + case.steps):
        driver.step(tuple(x[:, :, i : i + 1] for x in (q, k, v)))
    assert driver.kept() == [[head.held for head in row] for row in wanted]
    for row, length in enumerate(case.lengths):
        held = driver.store().storage.row(row)
        for head, one in enumerate(wanted[row]):
            index = torch.tensor(one.held) + prompt - length
            assert torch.equal(held.keys[0, head], k[row, head, index])
            assert torch.equal(held.values[0, head], v[row, head, index])
            scores = held.slot_state[SCORE][0, head].double()
            assert torch.allclose(scores, torch.tensor(one.scores).double(), rtol=1e-4, atol=1e-7)


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [c for c in cases if any(n > c.slots(n) for n in c.lengths)]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {c.head_dim for c in compressed if c.group == group} == set(HEAD_DIMS)
    assert {tuple(c.options) for c in compressed} == {
        (), ("recent",), ("heavy",), ("heavy", "recent"),
    }  # fmt: skip
    assert sum(len(set(c.lengths)) > 1 for c in compressed) >= 40
    assert sum(c.chunks is not None for c in compressed) >= 60
    assert sum(c.steps > 0 for c in compressed) >= 60
    assert sum(isinstance(c.budget, str) for c in compressed) >= 30
    for excess in (-1, 0, 1):
        numbers = [c for c in cases if isinstance(c.budget, int)]
        assert sum(max(c.lengths) - c.budget == excess for c in numbers) >= 10
