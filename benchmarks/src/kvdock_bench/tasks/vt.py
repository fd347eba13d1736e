"""Variable tracking: follow a chain of assignments through noise.

Prompt wording and task parameters follow RULER (Hsieh et al., COLM 2024, https://arxiv.org/abs/2404.06654).
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvdock_bench.tasks.base import Args, Range, Sample, SampleKey, check_args
from kvdock_bench.tasks.niah import NOISE, padding

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData


@dataclass(frozen=True, slots=True)
class VariableTracking:
    """Ask for every variable that a value reaches; a worked example comes first."""

    name: str = "vt"
    group: str = "tracking"
    metric: str = "string_match_all"
    max_new_tokens: int = 30
    defaults: ClassVar[dict[str, Any]] = {"num_chains": 1, "num_hops": 4, "one_shot": True}

    def check_args(self, args: Args) -> None:
        """Raise BenchError when an argument is unknown or out of range."""
        bounds = {"num_chains": Range(1, 20), "num_hops": Range(1, 20)}
        check_args(self.name, args, bounds, switches=("one_shot",))

    def units(self, length: int, args: Args, data: TaskData) -> tuple[int, int]:
        """Count blocks of noise."""
        return 1, max(1, length // 10)

    def build(
        self, n_units: int, key: SampleKey, args: Args, data: TaskData, *, fill: int = 0
    ) -> Sample:
        """Scatter the chains over n_units blocks of noise."""
        chains, hops = args["num_chains"], args["num_hops"]
        context, question, prefix, answer = _problem(n_units, 5, chains, hops, key.rng("chains"))
        context += padding(fill)
        if args["one_shot"]:
            # RULER's example has 500 tokens; a shorter prompt gets a shorter example.
            blocks = max(1, min(10, key.length // 256))
            shown = _problem(blocks, 3, chains, hops, key.rng("example"))
            context = f"{shown[0]}\n{shown[1]}{shown[2]} {' '.join(shown[3])}\n\n{context}"
        meta = {"args": dict(args)}
        return Sample(self.name, 0, context, question, prefix, tuple(answer), meta)

    def data_source(self, data: TaskData) -> str:
        """Everything is generated, as in RULER."""
        return "as RULER: generated"


def _problem(
    n_blocks: int, letters: int, n_chains: int, hops: int, rng: random.Random
) -> tuple[str, str, str, list[str]]:
    """Return the text, the question, the answer's beginning and the answer of one problem."""
    wanted = n_chains * (hops + 1)
    names: dict[str, None] = {}
    while len(names) < wanted:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    # Distinct values, or two chains would both be right.
    values = rng.sample(range(10_000, 99_999), n_chains)
    pool = list(names)
    chains = [pool[start : start + hops + 1] for start in range(0, wanted, hops + 1)]
    placed: list[tuple[int, str]] = []
    for chain, value in zip(chains, values, strict=True):
        sources = [str(value), *(f"VAR {name}" for name in chain)]
        # Statements of a chain stay in order; depths are shares, so they hold while the fit probes.
        depths = sorted(rng.random() for _ in chain)
        placed += [
            (int(depth * (n_blocks + 1)), f"VAR {name} = {source}")
            for depth, name, source in zip(depths, chain, sources, strict=False)
        ]
    lines: list[str] = []
    placed.sort(key=lambda item: item[0])
    for block in range(n_blocks + 1):
        lines += [statement for position, statement in placed if position == block]
        lines += [NOISE] if block < n_blocks else []
    answer = chains[0]
    return *worded("\n".join(lines), values[0], len(answer)), answer


def worded(haystack: str, value: int, n_names: int) -> tuple[str, str, str]:
    """Put RULER's words around a haystack: context, question and answer prefix."""
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + haystack,
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        # RULER's own spelling, kept because the model reads it.
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{n_names} variables are assgined the value {value}, they are:",
    )
