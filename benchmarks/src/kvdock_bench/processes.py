"""Start workers as processes of this machine and talk with them over pipes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kvdock_bench.jobs import Job
from kvdock_bench.placement import Place, Placement
from kvdock_bench.team import Died, Event, Finished, Raised, Ready, harmless
from kvdock_bench.worker import RemoteWorker, Setup


class Process:
    """One worker process and this end of its pipe."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    def give(self, job: Job) -> None:
        """Send a job; a process that is gone shows in `receive`."""
        with contextlib.suppress(OSError):
            self.pipe.send(job)

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def receive(self) -> Event:
        """Return the next event."""
        try:
            event: Event = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return Died(_cause(self.process.exitcode))
        return event


class Processes:
    """Start the workers of a placement on this machine."""

    name = "processes"

    def __init__(self, setup: Setup, placement: Placement) -> None:
        self.workers = placement.workers
        self._setup, self._placement = setup, placement
        self._context = multiprocessing.get_context("spawn")
        self._living: list[Process] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="kvdock-", ignore_cleanup_errors=True)
        self._started = 0

    def start(self, number: int) -> Sequence[Process]:
        """Start the processes of one worker."""
        self._started += 1
        # a file, because a port that is free now may be taken a moment later
        meeting = (Path(self._scratch.name) / str(self._started)).as_uri()
        places = self._placement.places(self._placement.devices(number), meeting)
        started = [self._spawn(place) for place in places]
        self._living += started
        return started

    def wait(self, members: Sequence[Any], timeout: float) -> list[tuple[Any, Event]]:
        """Return one event of each process that has one."""
        by_pipe = {member.pipe: member for member in members}
        ready = [by_pipe[pipe] for pipe in wait(list(by_pipe), timeout)]  # type: ignore[index]
        return [(member, member.receive()) for member in ready]

    def close(self) -> None:
        """End every process."""
        for member in self._living:
            with contextlib.suppress(ValueError, OSError):
                member.kill()
        self._scratch.cleanup()

    def _spawn(self, place: Place) -> Process:
        ours, theirs = self._context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // (self.workers * self._placement.processes))
        process = self._context.Process(
            target=_serve, args=(self._setup, place, threads, theirs), daemon=True
        )
        process.start()
        # only the child holds its end then, so that its death ends the pipe
        theirs.close()
        return Process(process, ours)


def _serve(setup: Setup, place: Place, threads: int, pipe: Connection) -> None:
    """Load the model and do jobs until the pipe closes."""
    _die_with_parent()
    try:
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        worker = RemoteWorker(setup, place)
        pipe.send(Ready(worker.facts))
        while True:
            for news in worker.run(pipe.recv()):
                pipe.send(news)
            pipe.send(Finished())
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(Raised(harmless(error)))


def _die_with_parent() -> None:
    """End this process when the one that writes the answers is gone, however it went."""
    # Ctrl-C reaches every process of a terminal; the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
    return f"ended with code {code}"
