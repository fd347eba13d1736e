"""Kept positions on random cases, through the core's own layer path, against a float64 oracle."""

import random
from dataclasses import dataclass

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_cakekv import policy as policy_module
from kvdock_cakekv.options import CakeKVOptions
from kvdock_cakekv.policy import CakeKVPolicy

from . import oracle

pytestmark = pytest.mark.versionless

CASES, LAYERS = 256, 4
GROUPS, HEAD_DIMS = (1, 3, 4, 8), (64, 96, 128)
TAUS = ((1.0, 1.0), (1.6, 0.4), (0.5, 2.0))
SHARPNESS = (0.2, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Case:
    seed: int
    kv_heads: int
    group: int
    head_dim: int
    window: int
    kernel: int
    gamma: float
    tau: tuple[float, float]
    budget: int | str
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] | None

    def slots(self, length):
        """Return the row's allowance, worked out apart from `Budget`."""
        text = str(self.budget)
        return max(1, length * int(text[:-1]) // 100) if text.endswith("%") else int(text)

    def policy(self):
        options = CakeKVOptions(
            window=self.window, kernel=self.kernel, gamma=self.gamma,
            tau1=self.tau[0], tau2=self.tau[1],
        )  # fmt: skip
        return CakeKVPolicy(options)

    def wanted(self, states):
        """Return the oracle's positions [layer][row][k], and whether all choices were clear."""
        rows = [
            oracle.prompt(
                [(q[row, :, -length:], k[row, :, -length:]) for q, k, _ in states],
                slots=self.slots(length), window=self.window, gamma=self.gamma,
                kernel=self.kernel, tau=self.tau, scaling=self.head_dim**-0.5,
            )
            for row, length in enumerate(self.lengths)
        ]  # fmt: skip
        kept = [list(layer) for layer in zip(*[layers for layers, _ in rows], strict=True)]
        return kept, all(clear for _, clear in rows)

    def draw(self):
        """Draw states until float32 can decide every choice; return them with the oracle's."""
        shape = (len(self.lengths), self.kv_heads, self.group, max(self.lengths), self.head_dim)
        for attempt in range(60):
            states = []
            for layer in range(LAYERS):
                q, k, v = random_states(100 * (self.seed + 1000 * attempt) + layer, *shape)
                states.append((q * SHARPNESS[(self.seed + layer) % LAYERS], k, v))
            kept, clear = self.wanted(states)
            if clear:
                return states, kept
        raise AssertionError("no clear draw in 60")


def make_case(seed):
    """Draw one case; the seed's remainders make sure that every kind appears often."""
    rng = random.Random(seed)
    window = rng.choice((1, 2, 5, 8, 16))
    slots = window + rng.choice((1, 4, 9, 20))
    longest = slots + {0: -1, 1: 0, 2: 1}.get(seed % 9, rng.randint(2, 60))
    lengths = [longest]
    if seed % 3 == 0:
        lengths += [rng.randint(1, longest) for _ in range(rng.choice((1, 2)))]
        rng.shuffle(lengths)
    cut = longest - 1 if seed % 4 == 1 else rng.randint(1, longest - 1)
    return Case(
        seed, rng.choice((1, 2)), GROUPS[seed % 4], HEAD_DIMS[seed // 4 % 3], window,
        (1, 5)[seed // 2 % 2], (200.0, 0.0, 3.0)[seed // 5 % 3], TAUS[seed // 3 % 3],
        f"{rng.choice((5, 30, 60))}%" if seed % 7 == 3 else slots,
        tuple(lengths), (cut, longest - cut) if seed % 2 else None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(CASES))
def test_kept_positions_equal_the_oracle(seed, monkeypatch):
    if seed % 2:  # every layer shrinks again with every later one
        monkeypatch.setattr(policy_module, "SLACK_BYTES", 0)
    case = make_case(seed)
    states, wanted = case.draw()
    driver = LayerDriver(case.policy(), case.budget, LAYERS)
    driver.prompt(*states, lengths=case.lengths, chunks=case.chunks)
    for layer, (_, k, v) in enumerate(states):
        assert driver.kept(layer) == wanted[layer]
        for row, length in enumerate(case.lengths):
            held = driver.store(layer).storage.row(row)
            index = torch.tensor(wanted[layer][row]) + max(case.lengths) - length
            index = index[..., None].expand(-1, -1, case.head_dim)
            assert torch.equal(held.keys[0], k[row].gather(1, index))
            assert torch.equal(held.values[0], v[row].gather(1, index))
    for row, length in enumerate(case.lengths):
        total = sum(len(wanted[layer][row][0]) for layer in range(LAYERS))
        assert total == LAYERS * min(length, case.slots(length))


def test_cases_cover_what_they_claim():
    cases = [make_case(seed) for seed in range(CASES)]
    compressed = [c for c in cases if any(n > c.slots(n) for n in c.lengths)]
    assert len(compressed) >= 200
    for group in GROUPS:
        assert {c.head_dim for c in compressed if c.group == group} == set(HEAD_DIMS)
    assert {c.tau for c in compressed} == set(TAUS)
    for excess in (-1, 0, 1):
        assert sum(max(c.lengths) - c.slots(max(c.lengths)) == excess for c in cases) >= 10
    assert sum(len(set(c.lengths)) > 1 for c in compressed) >= 40
    assert sum(c.chunks is not None for c in compressed) >= 60
    assert any(isinstance(c.budget, str) and c.window >= c.slots(max(c.lengths)) for c in cases)


@pytest.mark.parametrize("decode_pool", [True, False])
@pytest.mark.parametrize("lengths", [(40, 12, 27), (31,), (12,)])
@pytest.mark.parametrize("seed", range(8))
def test_decode_releases_what_the_oracle_releases(seed, lengths, decode_pool):
    """Rows of different lengths, one below the budget at first, each against its own naive run."""
    kv_heads, group, slots, window, layers, steps = 2, GROUPS[seed % 4], 16, 6, 2, 12
    scaling = 64**-0.5
    shape = (len(lengths), kv_heads, group, max(lengths) + steps, 64)
    states = [random_states(50 * seed + layer, *shape) for layer in range(layers)]
    options = CakeKVOptions(window=window, decode_pool=decode_pool)
    driver = LayerDriver(CakeKVPolicy(options), slots, layers)
    driver.prompt(*[[x[:, :, : max(lengths)] for x in parts] for parts in states], lengths=lengths)
    held = [driver.kept(layer) for layer in range(layers)]
    allowance = [driver.store(layer).ledger.slots for layer in range(layers)]
    compared = 0
    for at in range(max(lengths), max(lengths) + steps):
        driver.step(*[[x[:, :, at : at + 1] for x in parts] for parts in states])
        for layer, (q, k, _) in enumerate(states):
            for row, length in enumerate(lengths):
                pad = max(lengths) - length
                before = [[*head, at - pad] for head in held[layer][row]]
                after, clear = oracle.step(
                    q[row, :, at : at + 1], k[row, :, pad:], before,
                    slots=allowance[layer][row], window=window,
                    kernel=5 if decode_pool else 1, scaling=scaling,
                )  # fmt: skip
                found = driver.kept(layer)[row]
                assert found == after or not clear
                assert [len(head) for head in found] == [len(head) for head in after]
                compared += clear
                held[layer][row] = found
    assert compared > 0.9 * steps * layers * len(lengths)
