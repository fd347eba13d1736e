"""Any sequence of prompts, turns, steps and row changes is, row by row, the naive method."""

import random

import pytest
import torch

from .harness import make_layer
from .oracle import NaiveRow

HEAD_DIM = 16


class Run:
    """One bare layer next to one naive row per row, fed the same states."""

    def __init__(self, rng, recompress):
        self.rng, self.recompress = rng, recompress
        options = {
            "window": rng.choice((1, 3, 6)), "kernel": rng.choice((1, 3, 5)),
            "pooling": rng.choice(("max", "avg")),
        }  # fmt: skip
        self.budget = rng.choice((options["window"] + rng.choice((1, 3, 9)), "10%", "30%", "60%"))
        self.layer = make_layer(self.budget, recompress=recompress, **options)
        lengths = [rng.randint(2, 40) for _ in range(rng.randint(1, 4))]
        self.rows = [NaiveRow(2, **options) for _ in lengths]
        self.prompt(lengths, compress=True)

    def slots(self, seen):
        """Return a row's allowance, worked out apart from `Budget`."""
        if isinstance(self.budget, int):
            return self.budget
        return max(1, seen * int(self.budget[:-1]) // 100)

    def prompt(self, lengths, *, compress):
        """Feed a prompt or a later turn, in one piece or two."""
        first = self.rng.randint(1, max(lengths))
        chunks = [size for size in (first, max(lengths) - first) if size]
        self.compare(
            lengths,
            lambda states: self.layer.prompt(states, lengths=lengths, chunks=chunks),
            compress,
        )

    def step(self):
        """Feed one token per row."""
        self.compare([1] * len(self.rows), self.layer.step, False)

    def turn(self):
        """Feed a second or later prompt; without recompression rows may bring nothing."""
        least = 1 if self.recompress else 0
        lengths = [self.rng.randint(2, 7), *(self.rng.randint(least, 7) for _ in self.rows[1:])]
        self.prompt(lengths, compress=self.recompress)

    def reorder(self):
        """Permute, repeat or drop rows."""
        order = self.rng.choices(range(len(self.rows)), k=self.rng.randint(1, 4))
        self.layer.select_rows(order)
        self.rows = [self.rows[row].copy() for row in order]

    def compare(self, lengths, feed, compress):
        columns = max(lengths)
        q, k, v = (torch.randn(len(lengths), h, columns, HEAD_DIM) for h in (4, 2, 2))
        (output,) = feed((q * 2, k, v))
        for index, (row, n) in enumerate(zip(self.rows, lengths, strict=True)):
            real = slice(columns - n, columns)
            wanted = row.forward(
                q[index, :, real] * 2, k[index, :, real], v[index, :, real],
                scaling=HEAD_DIM**-0.5, slots=self.slots(row.seen + n) if compress else None,
            )  # fmt: skip
            found = output[index, real].transpose(0, 1).double()
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert all(row.sure for row in self.rows), "float32 cannot decide: choose another seed"
        assert self.layer.kept() == [row.held for row in self.rows]


@pytest.mark.parametrize("recompress", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence(seed, recompress):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    run = Run(rng, recompress)
    for _ in range(15):
        rng.choice((run.step, run.step, run.turn, run.reorder))()
