"""One loaded model that does a run's jobs, in this process or in another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import kvdock
from kvdock_bench import metadata, models
from kvdock_bench.jobs import Job
from kvdock_bench.placement import Place
from kvdock_bench.plan import Plan, run_identity
from kvdock_bench.progress import Reporter
from kvdock_bench.prompting import Prompter
from kvdock_bench.record import Record
from kvdock_bench.run import Attach, Run, Sink
from kvdock_bench.runner import Runner
from kvdock_bench.sources import load_data


@dataclass(frozen=True, slots=True)
class Setup:
    """What every process of a run has to know; it can be sent to another machine.

    Args:
        model_path: as the user gave it.
        time_limit: seconds for one answer; None for any.
        trust_remote_code: run code that the model brings with it.
    """

    model_path: str
    dtype: str
    plan: Plan
    adapter_path: str | None = None
    time_limit: float | None = None
    trust_remote_code: bool = False
    attach: Attach = kvdock.attach


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run has to know of the model that answers, wherever it is loaded."""

    identity: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    hardware: dict[str, Any]


@dataclass(slots=True)
class News:
    """What happened since the last look; it can be sent to another process."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_run(setup: Setup, loaded: models.Loaded, sink: Sink) -> tuple[Run, Facts]:
    """Return what the loop works with, and what run.json says of the model."""
    config = setup.plan.config
    prompter = Prompter(loaded.tokenizer, config)
    data, tasks = load_data(config.data), list(config.tasks)
    identity = run_identity(loaded.fingerprint, prompter.template_id, data, tasks)
    facts = Facts(
        identity=identity,
        data=data.describe(tasks),
        model=metadata.describe_model(loaded, models.locate(setup.model_path)),
        hardware=metadata.describe_hardware(loaded.devices, loaded.shards),
    )
    run = Run(
        plan=setup.plan,
        loaded=loaded,
        prompter=prompter,
        data=data,
        sink=sink,
        identity=identity,
        attach=setup.attach,
        device=facts.hardware["device"],
        time_limit=setup.time_limit,
    )
    return run, facts


class Worker:
    """Load a model once and do jobs with it, switching methods without loading again.

    Args:
        place: where the model's parts go.
    """

    def __init__(
        self, setup: Setup, place: Place, sink: Sink, reporter: Reporter | None = None
    ) -> None:
        loaded = models.load(
            setup.model_path,
            dtype=setup.dtype,
            device=place,
            adapter_path=setup.adapter_path,
            trust_remote_code=setup.trust_remote_code,
        )
        _try_methods(setup, loaded)
        run, self.facts = make_run(setup, loaded, sink)
        self._runner = Runner(run, reporter or _Silent())

    def report_to(self, reporter: Reporter) -> None:
        """Choose who is told about progress."""
        self._runner.reporter = reporter

    def steps(self, job: Job) -> Iterator[None]:
        """Do a job, pausing after every batch."""
        return self._runner.steps(job)


class RemoteWorker:
    """A worker whose answers somebody else writes down."""

    def __init__(self, setup: Setup, place: Place) -> None:
        self._news = News()
        self._worker = Worker(setup, place, self, self)

    @property
    def facts(self) -> Facts:
        """Return what is known of the model."""
        return self._worker.facts

    def run(self, job: Job) -> Iterator[News]:
        """Do a job and hand over its answers, batch by batch."""
        for _ in self._worker.steps(job):
            if self._news.records:
                news, self._news = self._news, News()
                yield news
        if self._news != News():
            news, self._news = self._news, News()
            yield news

    def append(self, cell: str, record: Record) -> None:
        """Keep a record for the next look."""
        self._news.records.append((cell, record))

    def log(self, text: str) -> None:
        """Keep a traceback for the next look."""
        self._news.logs.append(text)

    def note(self, text: str) -> None:
        """Keep a remark for the next look."""
        self._news.notes.append(text)

    def advance(self, tokens: int, samples: int, label: str) -> None:
        """Say nothing: the one who writes the records counts them."""


class _Silent:
    def advance(self, tokens: int, samples: int, label: str) -> None: ...

    def note(self, text: str) -> None: ...


def _try_methods(setup: Setup, loaded: models.Loaded) -> None:
    """Attach each method once, so that what cannot run is refused before anything runs."""
    for method in setup.plan.methods:
        if method.ids:
            with setup.attach(loaded.model, **method.attach_arguments()):
                pass
