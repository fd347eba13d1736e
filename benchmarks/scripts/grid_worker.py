"""A grid's worker process: one model, and one job after another from a pipe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from grid_jobs import Job

import kvdock
from kvdock.errors import KVDockError
from kvdock_bench import metadata, models
from kvdock_bench.batches import Item
from kvdock_bench.config import BenchConfig, override
from kvdock_bench.plan import Plan, run_identity
from kvdock_bench.prompting import Prompter
from kvdock_bench.records import RecordStore
from kvdock_bench.run import Run
from kvdock_bench.runner import Runner
from kvdock_bench.sources import load_data
from kvdock_bench.tasks import Task

Prompts = dict[tuple[str, int, int], Item]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all workers have in common; `folder` takes one record store per job."""

    model_path: str
    dtype: str
    device: str
    config: BenchConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended; errors of single answers are in their records."""

    number: int
    seconds: float
    notes: list[str]
    error: str | None = None


class _Notes:
    """A reporter that keeps what would have been printed."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def advance(self, tokens: int, samples: int, label: str) -> None:
        """Say nothing: the driver counts jobs."""

    def note(self, text: str) -> None:
        """Keep a remark."""
        self.texts.append(text)


class _SharingRunner(Runner):
    """A runner that makes a prompt once for all jobs of its process."""

    def __init__(self, run: Run, notes: _Notes, prompts: Prompts) -> None:
        super().__init__(run, notes)
        self._prompts = prompts

    def _prepare(self, task: Task, length: int, index: int) -> Item:
        key = (task.name, length, index)
        if key not in self._prompts:
            self._prompts[key] = super()._prepare(task, length, index)
        return self._prompts[key]


def work(setup: Setup, pipe: Connection) -> None:
    """Load the model, say so with None, and answer every job with its `Done`."""
    torch.set_num_threads(1)
    loaded = models.load(setup.model_path, dtype=setup.dtype, device=setup.device)
    common: dict[str, Any] = {
        "loaded": loaded,
        "prompter": Prompter(loaded.tokenizer, setup.config),
        "data": load_data(setup.config.data),
        "attach": kvdock.attach,
        "device": metadata.device_name(loaded.model.device),
        "error_log": setup.folder / "errors.log",
    }
    tasks = list(setup.config.tasks)
    common["identity"] = run_identity(
        loaded.fingerprint, common["prompter"].template_id, common["data"], tasks
    )
    prompts: Prompts = {}
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        pipe.send(_run(job, setup, common, prompts))
        if loaded.model.device.type == "cuda":
            # raises when a kernel broke the context; a fresh process takes the next job then
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _run(job: Job, setup: Setup, common: dict[str, Any], prompts: Prompts) -> Done:
    notes, started = _Notes(), time.perf_counter()
    plan = Plan(override(setup.config, length=[job.length]), (job.method,))
    store = RecordStore(setup.folder / str(job.number))
    error = None
    try:
        _SharingRunner(Run(plan=plan, store=store, **common), notes, prompts)()
    except KVDockError as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
    return Done(job.number, time.perf_counter() - started, notes.texts, error)
