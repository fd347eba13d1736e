"""Any sequence of prompts, turns, steps and row changes is, row by row, the naive method."""

import copy
import random

import pytest
import torch

from .harness import held, make_layer, rotation
from .oracle import NaiveLayer, rope

HEAD_DIM, LAYERS = 8, 2


class Run:
    """Two bare layers next to naive ones for every row, fed the same raw states."""

    def __init__(self, rng, positions):
        self.rng = rng
        sinks = rng.choice((0, 1, 3, 6))
        budget = rng.choice((sinks + 1, sinks + 2, sinks + 5, rng.choice(("5%", "20%", "60%"))))
        self.driver = make_layer(
            budget, rotate=rotation(HEAD_DIM), layers=LAYERS, sinks=sinks, positions=positions
        )
        lengths = [rng.randint(1, rng.choice((3, 30))) for _ in range(rng.randint(1, 4))]
        if len(lengths) > 1 and rng.random() < 0.3:
            lengths[-1] = 0  # a row of pads only
        self.rows = [
            [NaiveLayer(allowance(budget, n), sinks, positions, rope) for _ in range(LAYERS)]
            for n in lengths
        ]
        self.prompt(lengths)

    def prompt(self, lengths):
        """Feed a prompt or a later turn, in one piece or two."""
        columns = max(lengths)
        first = self.rng.randint(1, columns)
        chunks = [size for size in (first, columns - first) if size]
        self.compare(
            lengths, lambda states: self.driver.prompt(*states, lengths=lengths, chunks=chunks)
        )

    def step(self):
        """Feed one token per row."""
        self.compare([1] * len(self.rows), lambda states: self.driver.step(*states))

    def turn(self):
        """Feed a second or later prompt; rows may bring nothing."""
        self.prompt([self.rng.randint(2, 6), *(self.rng.randint(0, 6) for _ in self.rows[1:])])

    def reorder(self):
        """Permute, repeat or drop rows."""
        order = self.rng.choices(range(len(self.rows)), k=self.rng.randint(1, 4))
        self.driver.select_rows(order)
        self.rows = [[copy.copy(layer) for layer in self.rows[row]] for row in order]

    def compare(self, lengths, feed):
        states, wanted = zip(*(self.draw(lengths, layer) for layer in range(LAYERS)), strict=True)
        for layer, output in enumerate(feed(states)):
            for found, one, n in zip(output, wanted[layer], lengths, strict=True):
                found = found[found.shape[0] - n :].transpose(0, 1).double()
                assert torch.allclose(found, one, rtol=1e-4, atol=1e-5)
            assert held(self.driver, layer) == [row[layer].held for row in self.rows]

    def draw(self, lengths, layer):
        """Return one layer's padded states and the naive outputs of its rows."""
        columns, rows = max(lengths), len(lengths)
        query = torch.zeros(rows, 4, columns, HEAD_DIM)
        key = torch.zeros(rows, 2, columns, HEAD_DIM)
        value = torch.randn(rows, 2, columns, HEAD_DIM)
        wanted = []
        for index, (row, n) in enumerate(zip(self.rows, lengths, strict=True)):
            naive, real = row[layer], slice(columns - n, columns)
            at = range(naive.seen, naive.seen + n)
            q, k = torch.randn(4, n, HEAD_DIM), torch.randn(2, n, HEAD_DIM)
            query[index, :, real], key[index, :, real] = rope(q, at).float(), rope(k, at).float()
            v = value[index, :, real].double()
            wanted.append(naive.forward(q.double(), k.double(), v, HEAD_DIM**-0.5))
        return (query, key, value), wanted


def allowance(budget, length):
    """Return a row's slots, worked out apart from `Budget`."""
    return budget if isinstance(budget, int) else max(1, length * int(budget[:-1]) // 100)


@pytest.mark.parametrize("positions", ["cache", "original"])
@pytest.mark.parametrize("seed", range(15))
def test_any_sequence(seed, positions):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    run = Run(rng, positions)
    for _ in range(20):
        rng.choice((run.step, run.step, run.step, run.turn, run.reorder))()
