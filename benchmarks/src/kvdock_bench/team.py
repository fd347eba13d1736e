"""Lead several worker processes through a run: who is free takes the longest job that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kvdock.errors import KVDockError
from kvdock_bench.errors import BenchError, WorkerLost
from kvdock_bench.jobs import Job
from kvdock_bench.progress import Reporter
from kvdock_bench.record import OOM, Record
from kvdock_bench.run import Sink
from kvdock_bench.worker import Facts, News

ATTEMPTS = 2
_BLINK = 2.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A process has loaded its model."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class Finished:
    """A process has done its job."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A process met an error outside the answers themselves."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Died:
    """A process is gone."""

    reason: str


Event = Ready | News | Finished | Raised | Died


class Member(Protocol):
    """One process of a worker; with tensor parallelism a worker has several."""

    def give(self, job: Job) -> None:
        """Start a job; its events follow."""

    def kill(self) -> None:
        """End the process at once."""


class Launcher(Protocol):
    """What starts processes and hears from them: Ray, or this machine alone."""

    name: str
    workers: int

    def start(self, number: int) -> Sequence[Member]:
        """Start the processes of one worker; each reports `Ready` when its model is loaded."""

    def wait(self, members: Sequence[Any], timeout: float) -> list[tuple[Any, Event]]:
        """Return what these processes report, within ``timeout`` seconds; [] where nothing did."""

    def close(self) -> None:
        """End everything that was started."""


@dataclass(eq=False, slots=True)
class _Order:
    job: Job
    attempt: int = 1
    """After the last one, the answers are recorded as errors, by a worker that still lives."""


@dataclass(eq=False, slots=True)
class _Worker:
    number: int
    members: Sequence[Member]
    order: _Order | None = None
    loading: set[int] = field(default_factory=set)
    working: set[int] = field(default_factory=set)
    done: set[tuple[str, int]] = field(default_factory=set)
    heard: float = field(default_factory=time.monotonic)


class Team:
    """Hold the workers of a run, replace those that die, and write every answer down.

    Args:
        patience: seconds without a sign after which a working process counts as dead; None waits.
    """

    def __init__(self, launcher: Launcher, sink: Sink, patience: float | None = None) -> None:
        self._launcher, self._sink, self._patience = launcher, sink, patience
        self._deaths = 0
        """Deaths since the last answer: where nothing gets done any more, nothing will."""
        self._workers: list[_Worker] = []
        self._reporter: Reporter | None = None
        self._queue: deque[_Order] = deque()
        self.facts = self._first_facts()

    def work(self, jobs: Sequence[Job], reporter: Reporter) -> None:
        """Return when every job is done or has failed for good."""
        self._reporter = reporter
        self._queue = deque(_Order(job) for job in jobs)
        while True:
            self._hand_out()
            busy = any(worker.order is not None for worker in self._workers)
            if not self._queue and not busy:
                return
            self._listen()

    def close(self) -> None:
        """End every process."""
        self._launcher.close()

    def _first_facts(self) -> Facts:
        self._facts: Facts | None = None
        try:
            self._workers = [self._start(number) for number in range(self._launcher.workers)]
            while self._facts is None:
                self._listen()
        except BaseException:
            self.close()
            raise
        return self._facts

    def _start(self, number: int) -> _Worker:
        members = self._launcher.start(number)
        return _Worker(number, members, loading=set(range(len(members))))

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.order is None and not worker.loading and self._queue:
                worker.order, worker.done = self._queue.popleft(), set()
                worker.working = set(range(len(worker.members)))
                worker.heard = time.monotonic()
                for member in worker.members:
                    member.give(worker.order.job)

    def _listen(self) -> None:
        """Take in what happened, waiting for a moment where nothing did."""
        owners = {
            id(member): (worker, place)
            for worker in self._workers
            for place, member in enumerate(worker.members)
            if worker.loading or worker.working
        }
        waiting = [member for worker in self._workers for member in worker.members]
        waiting = [member for member in waiting if id(member) in owners]
        for member, event in self._launcher.wait(waiting, _BLINK):
            worker, place = owners[id(member)]
            if worker in self._workers:  # it may have been buried a moment ago
                self._take(worker, place, event)
        for worker in list(self._workers):
            silent = time.monotonic() - worker.heard
            if self._patience and worker.order is not None and silent > self._patience:
                self._bury(worker, f"no sign of life for {silent:.0f} s")

    def _take(self, worker: _Worker, place: int, event: Event) -> None:
        worker.heard = time.monotonic()
        if isinstance(event, Ready):
            worker.loading.discard(place)
            self._compare(event.facts)
        elif isinstance(event, News):
            if place == 0:  # the others compute the same
                self._write(worker, event)
        elif isinstance(event, Finished):
            worker.working.discard(place)
            if not worker.working:
                worker.order = None
        elif isinstance(event, Died):
            self._bury(worker, event.reason)
        elif isinstance(event.error, WorkerLost):
            self._bury(worker, str(event.error))
        else:
            raise event.error

    def _compare(self, facts: Facts) -> None:
        """Refuse to mix answers of models that differ, as on nodes with other files."""
        if self._facts is None:
            self._facts = facts
        elif facts.identity != self._facts.identity:
            raise BenchError(
                "The workers loaded different models or data: "
                f"{facts.identity} and {self._facts.identity}. Give every machine the same files."
            )

    def _write(self, worker: _Worker, news: News) -> None:
        for cell, record in news.records:
            self._sink.append(cell, record)
            worker.done.add((record.method_id, record.index))
            self._deaths = 0
            self._say(None, record)
        for text in news.logs:
            self._sink.log(text)
        for text in news.notes:
            self._say(text)

    def _bury(self, worker: _Worker, reason: str) -> None:
        """Replace a worker; what it had not finished is tried once more, answer by answer."""
        for member in worker.members:
            member.kill()
        place, order = self._workers.index(worker), worker.order
        self._workers.remove(worker)
        self._deaths += 1
        if self._facts is None:
            raise BenchError(f"A worker ended while it loaded the model: {reason}.")
        if self._deaths > ATTEMPTS * self._launcher.workers + 2:
            raise BenchError(
                f"Workers keep dying; the last one: {reason}. Finished answers are kept; continue"
                " with --resume when the cause is removed."
            )
        if order is not None:
            left = order.job.without(worker.done).split()
            self._say(f"A worker died ({reason}); {len(left)} answers of its job are left.")
            if order.attempt == ATTEMPTS:
                # what one prompt alone needs is a result, as it is without several processes
                failure = OOM if reason == OOM else f"its worker died {ATTEMPTS} times: {reason}"
                left = [replace(job, failure=failure) for job in left]
            if order.attempt <= ATTEMPTS:
                again = [_Order(job, order.attempt + 1) for job in left]
                self._queue.extendleft(reversed(again))
        self._workers.insert(place, self._start(worker.number))

    def _say(self, text: str | None, record: Record | None = None) -> None:
        if self._reporter is None:
            return
        if record is not None:
            label = f"{record.length} {record.task}, {record.method}"
            self._reporter.advance(record.length, 1, label)
        if text is not None:
            self._reporter.note(text)


def harmless(error: Exception) -> Exception:
    """Return an error that can be sent to another process."""
    if isinstance(error, KVDockError):
        return error
    return BenchError(f"A worker failed: {type(error).__name__}: {error}")
