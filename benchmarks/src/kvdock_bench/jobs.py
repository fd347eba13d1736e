"""Pieces of a run that one process does in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvdock_bench.plan import Cell, Plan

Missing = Callable[[Cell], list[int]]


@dataclass(frozen=True, slots=True)
class Job:
    """Answers to the prompts of one task and length, by the methods that still lack them.

    Args:
        wanted: sample indices by method id, in the order of the methods.
        failure: why the answers are given up; they are recorded as errors then.
    """

    length: int
    task: str
    wanted: dict[str, tuple[int, ...]]
    failure: str | None = None

    @property
    def n_answers(self) -> int:
        """Return the number of answers to generate."""
        return sum(map(len, self.wanted.values()))

    @property
    def cost(self) -> int:
        """Return a measure of the work: prompt tokens over all answers."""
        return max(self.length, 1) * self.n_answers

    def without(self, done: set[tuple[str, int]]) -> Job:
        """Return what is left when these (method id, index) are done."""
        left = {
            method: tuple(index for index in indices if (method, index) not in done)
            for method, indices in self.wanted.items()
        }
        kept = {method: indices for method, indices in left.items() if indices}
        return replace(self, wanted=kept)

    def split(self) -> list[Job]:
        """Return one job per answer."""
        return [
            replace(self, wanted={method: (index,)})
            for method, indices in self.wanted.items()
            for index in indices
        ]


def whole_jobs(plan: Plan, missing: Missing) -> Iterator[Job]:
    """Yield one job per task and length, from short to long."""
    for length, task, cells in plan.groups():
        wanted = {cell.method.method_id: tuple(missing(cell)) for cell in cells}
        job = Job(length, task.name, {name: rows for name, rows in wanted.items() if rows})
        if job.wanted:
            yield job


def queue_of(plan: Plan, missing: Missing, size: int) -> list[Job]:
    """Return jobs of at most ``size`` samples of each method, the longest first.

    Whoever is free takes the next, so the short ones at the end keep all processes busy.
    """
    jobs = []
    for job in whole_jobs(plan, missing):
        indices = sorted({index for rows in job.wanted.values() for index in rows})
        for start in range(0, len(indices), size):
            part = set(indices[start : start + size])
            wanted = {
                method: tuple(index for index in rows if index in part)
                for method, rows in job.wanted.items()
            }
            kept = {method: rows for method, rows in wanted.items() if rows}
            jobs.append(Job(job.length, job.task, kept))
    return sorted(jobs, key=lambda job: -job.cost)
