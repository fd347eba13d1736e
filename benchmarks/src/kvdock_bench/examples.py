"""Pick samples to read: those on which the methods disagree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvdock_bench.columns import Board
from kvdock_bench.record import Record

PER_TASK = 2
_LONGEST = 600


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt's expected texts and the methods' answers: label, score in percent, text."""

    title: str
    references: list[str]
    answers: list[tuple[str, str, str]]


def examples(board: Board) -> list[Example]:
    """Return a few samples per task, those on which methods disagree first."""
    chosen = []
    for task in board.tasks:
        prompts: dict[tuple[int, int, str], dict[str, Record]] = {}
        for column in board.columns:
            for length in board.lengths:
                for record in column.cells.get((length, task), []):
                    place = length, record.index, record.prompt_sha
                    prompts.setdefault(place, {})[column.key] = record
        order = sorted(prompts, key=lambda p: (-_disagreement(prompts[p].values()), p))
        for place in order[:PER_TASK]:
            found = prompts[place]
            answers = [
                (column.label, _score(found[column.key]), _text(found[column.key]))
                for column in board.columns
                if column.key in found
            ]
            references = [_cut(text) for text in next(iter(found.values())).references]
            title = f"{task}, {place[0]} tokens, sample {place[1]}"
            chosen.append(Example(title, references, answers))
    return chosen


def _disagreement(records: Iterable[Record]) -> float:
    scores = [record.score for record in records if record.score is not None]
    return max(scores) - min(scores) if scores else 0.0


def _score(record: Record) -> str:
    return "" if record.score is None else f"{100 * record.score:.0f} %"


def _text(record: Record) -> str:
    return _cut((record.prediction if record.prediction is not None else record.error) or "")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"
