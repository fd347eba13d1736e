"""Choose who does the work of a run: this process, processes of this machine, or Ray."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvdock_bench.errors import BenchError
from kvdock_bench.jobs import queue_of, whole_jobs
from kvdock_bench.placement import Placement
from kvdock_bench.plan import Cell, Plan
from kvdock_bench.progress import Reporter
from kvdock_bench.run import Sink
from kvdock_bench.team import Launcher, Team
from kvdock_bench.worker import Facts, Setup, Worker

LAUNCHERS = ("ray", "processes")
_GRACE_S = 120.0


class Crew(Protocol):
    """Who answers the prompts of a run."""

    name: str
    """"alone", the launcher of its processes, or the server."""
    workers: int
    """Models at work at the same time."""
    facts: Facts

    def begin(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Get ready where answers are missing, and return what run.json says of it."""

    def work(self, plan: Plan, missing: Callable[[Cell], list[int]], reporter: Reporter) -> None:
        """Generate what is missing."""


class Alone:
    """Let this process do everything, cell by cell, from short prompts to long ones."""

    name = "alone"
    workers = 1

    def __init__(self, setup: Setup, placement: Placement, sink: Sink) -> None:
        (place,) = placement.places(placement.devices(0), "")
        self._worker = Worker(setup, place, sink)
        self.facts = self._worker.facts

    def begin(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Do nothing: the model is loaded."""
        return {}

    def work(self, plan: Plan, missing: Callable[[Cell], list[int]], reporter: Reporter) -> None:
        """Generate what is missing."""
        self._worker.report_to(reporter)
        for job in whole_jobs(plan, missing):
            for _ in self._worker.steps(job):
                pass


class Several:
    """Let several processes share the work, the longest prompts first."""

    def __init__(self, setup: Setup, launcher: Launcher, sink: Sink) -> None:
        self.name, self.workers = launcher.name, launcher.workers
        limit, rows = setup.time_limit, _rows(setup.plan)
        patience = None if limit is None else 2 * limit * rows + _GRACE_S
        self._rows = rows
        self._team = Team(launcher, sink, patience)
        self.facts = self._team.facts

    def begin(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Do nothing: the models are loaded, or are being loaded."""
        return {}

    def work(self, plan: Plan, missing: Callable[[Cell], list[int]], reporter: Reporter) -> None:
        """Generate what is missing."""
        samples, groups = plan.config.num_samples, sum(1 for _ in plan.groups())
        # enough jobs for everyone to end at about the same time, none smaller than a batch
        parts = -(-4 * self.workers // groups)
        size = min(samples, max(-(-samples // parts), self._rows))
        self._team.work(queue_of(plan, missing, size), reporter)

    def close(self) -> None:
        """End the processes."""
        self._team.close()


@contextlib.contextmanager
def crew_of(
    setup: Setup, placement: Placement, sink: Sink, launcher: str | None = None
) -> Iterator[Crew]:
    """Load the models; they are gone when the block ends.

    Args:
        launcher: one of `LAUNCHERS`; None takes Ray where it is installed.
    """
    if not placement.several_processes:
        yield Alone(setup, placement, sink)
        return
    several = Several(setup, _launcher(setup, placement, launcher), sink)
    try:
        yield several
    finally:
        several.close()


def _launcher(setup: Setup, placement: Placement, name: str | None) -> Launcher:
    if name is None:
        name = "ray" if placement.ray_address or _has_ray() else "processes"
    if name not in LAUNCHERS:
        raise BenchError(f"--launcher {name}: expected {' or '.join(LAUNCHERS)}.")
    if name == "processes":
        if placement.ray_address is not None:
            raise BenchError("--ray-address needs --launcher ray.")
        from kvdock_bench.processes import Processes

        return Processes(setup, placement)
    if not _has_ray():
        raise BenchError("Ray is not installed. Install it: pip install 'kvdock-bench[ray]'")
    from kvdock_bench.ray_launcher import RayLauncher

    return RayLauncher(setup, placement)


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None


def _rows(plan: Plan) -> int:
    """Return the prompts of a batch, where they are known beforehand."""
    chosen = plan.config.batch_size
    return chosen if isinstance(chosen, int) else 16
