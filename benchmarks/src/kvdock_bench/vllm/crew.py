"""Let vLLM answer a run's prompts, in place of a model of this process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvdock_bench import models
from kvdock_bench.jobs import whole_jobs
from kvdock_bench.placement import Placement
from kvdock_bench.plan import Cell, Plan
from kvdock_bench.progress import Reporter
from kvdock_bench.run import Sink
from kvdock_bench.runner import Runner
from kvdock_bench.vllm.serve import LOG, Engine, serving
from kvdock_bench.worker import Setup, make_run


class Served:
    """Send every prompt to one vLLM process, which starts only where answers are missing.

    Args:
        exits: ends the process.
        folder: the run's, which takes vLLM's output.
    """

    name = "vllm"
    workers = 1

    def __init__(
        self,
        setup: Setup,
        placement: Placement,
        sink: Sink,
        engine: Engine,
        folder: Path,
        exits: contextlib.ExitStack,
    ) -> None:
        self._setup, self._engine, self._folder, self._exits = setup, engine, folder, exits
        device = placement.devices(0)[0]
        loaded = models.describe(
            setup.model_path,
            dtype=setup.dtype,
            device=device,
            trust_remote_code=setup.trust_remote_code,
        )
        self._run, facts = make_run(setup, loaded, sink)
        self.facts = dataclasses.replace(facts, model={**facts.model, "attention": "of vLLM"})

    def begin(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Start vLLM and return what it says of itself."""
        say(f"Starting vLLM; its output: {self._folder / LOG}")
        place, loaded = models.locate(self._setup.model_path), self._run.loaded
        config = self._run.plan.config
        context = serving(self._engine, loaded, place, config, self._folder)
        generator, told = self._exits.enter_context(context)
        self._run = dataclasses.replace(self._run, generator=generator)
        if loaded.model.device.type == "cuda":
            self._run = dataclasses.replace(self._run, device=told["device_name"])
        return {"vllm": told}

    def work(self, plan: Plan, missing: Callable[[Cell], list[int]], reporter: Reporter) -> None:
        """Generate what is missing."""
        runner = Runner(self._run, reporter)
        for job in whole_jobs(plan, missing):
            for _ in runner.steps(job):
                pass


@contextlib.contextmanager
def served_crew(
    setup: Setup, placement: Placement, sink: Sink, engine: Engine, folder: Path
) -> Iterator[Served]:
    """Yield the crew; its process ends with the block."""
    with contextlib.ExitStack() as exits:
        yield Served(setup, placement, sink, engine, folder, exits)
