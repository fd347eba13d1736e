"""A grid's worker process: one model, and one job after another from a pipe."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from grid_jobs import Chunk, Job, chunks_of

import kvdock
from kvdock.errors import KVDockError
from kvdock_bench import metadata, models
from kvdock_bench.batches import Item
from kvdock_bench.config import BenchConfig, override
from kvdock_bench.jobs import whole_jobs
from kvdock_bench.methods import MethodConfig
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
    """What all workers have in common; `folder` takes one record store per job.

    Args:
        batch_tokens: the most prompt tokens of a batch, as a padded mask grows with their square.
    """

    model_path: str
    dtype: str
    device: str
    config: BenchConfig
    folder: Path
    batch_tokens: int


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
    """A runner that takes the prompts that any process made."""

    def __init__(self, run: Run, prompts: Prompts) -> None:
        self.notes = _Notes()
        super().__init__(run, self.notes)
        self._prompts = prompts

    def _prepare(self, task: Task, length: int, index: int) -> Item:
        key = (task.name, length, index)
        if key not in self._prompts:
            # made too late by another process, if at all
            self._prompts[key] = super()._prepare(task, length, index)
        return self._prompts[key]

    def make(self, chunk: Chunk, folder: Path) -> None:
        """Write the prompts of a chunk."""
        (task,) = [task for task in self.run.plan.config.tasks if task.name == chunk.task]
        items = [self._prepare(task, chunk.length, index) for index in chunk.indices]
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            pickle.dump(items, file)
        Path(name).replace(_place(chunk, folder))


def _place(chunk: Chunk, folder: Path) -> Path:
    return folder / f"{chunk.name}.prompts"


def _read_prompts(config: BenchConfig, folder: Path, prompts: Prompts) -> None:
    """Add the prompts that are there and not yet known."""
    for chunk in chunks_of(config):
        path = _place(chunk, folder)
        if (chunk.task, chunk.length, chunk.indices[0]) in prompts or not path.exists():
            continue
        # written by a worker of this grid a moment ago
        for item in pickle.loads(path.read_bytes()):
            prompts[chunk.task, chunk.length, item.index] = item


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
    }
    tasks = list(setup.config.tasks)
    common["identity"] = run_identity(
        loaded.fingerprint, common["prompter"].template_id, common["data"], tasks
    )
    prompts: Prompts = {}
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        if isinstance(job, Chunk):
            _runner(job.length, (), setup, common, prompts).make(job, setup.folder)
            pipe.send(None)
            continue
        done = _run(job, setup, common, prompts)
        if loaded.model.device.type == "cuda":
            # raises when a kernel broke the context; a fresh process takes the next job then
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        pipe.send(done)


def _run(job: Job, setup: Setup, common: dict[str, Any], prompts: Prompts) -> Done:
    started, error = time.perf_counter(), None
    runner = _runner(job.length, (job.method,), setup, common, prompts, str(job.number))
    _read_prompts(runner.run.plan.config, setup.folder, prompts)
    try:
        for part in whole_jobs(runner.run.plan, lambda _: list(range(setup.config.num_samples))):
            for _ in runner.steps(part):
                pass
    except KVDockError as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
    return Done(job.number, time.perf_counter() - started, runner.notes.texts, error)


def _runner(
    length: int,
    methods: tuple[MethodConfig, ...],
    setup: Setup,
    common: dict[str, Any],
    prompts: Prompts,
    place: str = "prompts",
) -> _SharingRunner:
    size = setup.config.batch_size
    if isinstance(size, int):
        size = max(1, min(size, setup.batch_tokens // length))
    plan = Plan(override(setup.config, length=[length], batch_size=size), methods)
    store = RecordStore(setup.folder / place)
    return _SharingRunner(Run(plan=plan, sink=store, **common), prompts)
