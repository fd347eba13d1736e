"""The run loop: prompts once for all methods, batches, out-of-memory, one record per answer."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kvdock.errors import KVDockError
from kvdock_bench.batches import Item, make_batches
from kvdock_bench.context import check_prompt, context_of
from kvdock_bench.errors import WorkerLost
from kvdock_bench.fitting import fit_sample
from kvdock_bench.generate import Answer, Generator, Settings
from kvdock_bench.jobs import Job
from kvdock_bench.limits import BatchSizes, TimeLimit, within
from kvdock_bench.oom import is_oom, release
from kvdock_bench.plan import Cell
from kvdock_bench.progress import Reporter
from kvdock_bench.record import OOM, UNFIT
from kvdock_bench.run import Run
from kvdock_bench.tasks import OWN_LENGTH, Task

WARM_UP = Settings(max_new_tokens=2)


class Runner:
    """Generate what is missing of a run."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self.run = run
        self.reporter = reporter
        loaded = run.loaded
        self._generator = run.generator or Generator(
            loaded.model, loaded.tokenizer, loaded.shape, loaded.item_bytes, shards=loaded.shards
        )
        self._warm: set[str] = set()
        self._sizes = BatchSizes(run.plan.config.batch_size, loaded)
        self._tasks = {task.name: task for task in run.plan.config.tasks}
        self._methods = {method.method_id: method for method in run.plan.methods}

    def steps(self, job: Job) -> Iterator[None]:
        """Generate a job's answers, pausing after every batch; methods share each prompt."""
        task = self._tasks[job.task]
        wanted = sorted({index for indices in job.wanted.values() for index in indices})
        items = {index: self._prepare(task, job.length, index) for index in wanted}
        for method_id, indices in job.wanted.items():
            cell = Cell(self._methods[method_id], job.length, task)
            if job.failure is None:
                yield from self._run_cell(cell, [items[index] for index in indices])
                continue
            for index in indices:
                self._save(cell, items[index], 0, error=job.failure)

    def _prepare(self, task: Task, length: int, index: int) -> Item:
        fitted = fit_sample(
            task,
            index=index,
            length=length,
            prompter=self.run.prompter,
            seed=self.run.plan.config.seed,
            data=self.run.data,
        )
        ids = fitted.prompt.input_ids
        if length == OWN_LENGTH:
            answer = self.run.plan.config.max_new_tokens(task)
            context = context_of(self.run.loaded.model.config)
            check_prompt(f"{task.name}, sample {index}", len(ids), answer, context)
        sha = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
        references = list(fitted.sample.references)
        return Item(
            index,
            ids,
            sha,
            references,
            fitted.units,
            fitted.fit,
            fitted.sample.meta,
            fitted.prompt.n_tail,
            fitted.sample.likelihood,
        )

    def _run_cell(self, cell: Cell, items: list[Item]) -> Iterator[None]:
        for item in items:
            if not item.fit:
                self._save(cell, item, 0, error=UNFIT)
        todo = [item for item in items if item.fit]
        if not todo:
            return
        with self._attached(cell) as dock:
            self._warm_up(cell, todo[0], dock)
            queue = make_batches(todo, self._limit(cell), padding=cell.method.supports_padding)
            while queue:
                batch = queue.pop(0)
                if halves := self._run_batch(cell, batch, dock):
                    rest = [item for later in queue for item in later]
                    padding = cell.method.supports_padding
                    queue = halves + make_batches(rest, self._limit(cell), padding=padding)
                yield

    def _run_batch(self, cell: Cell, batch: list[Item], dock: Any) -> list[list[Item]]:
        """Record a batch; returns its halves instead where a smaller one may do better."""
        limit, split = self.run.time_limit, False
        try:
            with within(limit and limit * len(batch)):
                answers = self._generator.run(
                    [item.ids for item in batch],
                    self._settings(cell, batch),
                    dock,
                    tails=[item.n_tail for item in batch],
                )
        except KVDockError:
            raise
        except Exception as error:
            reason = OOM if is_oom(error) else f"{type(error).__name__}: {error}"[:500]
            # one row may have held up the others
            split = len(batch) > 1 and (reason == OOM or isinstance(error, TimeLimit))
            if reason != OOM:
                self._log_error(cell, batch)
            # the traceback's frames hold the batch's tensors
            traceback.clear_frames(error.__traceback__)
        else:
            for item, answer in zip(batch, answers, strict=True):
                self._save(cell, item, len(batch), answer=answer)
            return []
        self._recover(reason)
        if split:
            half = (len(batch) + 1) // 2
            self.reporter.note(f"{len(batch)} prompts at once: {reason}. Trying {half}.")
            if reason == OOM:
                self._sizes.learn(cell.method.method_id, cell.length, half)
            return [batch[:half], batch[half:]]
        for item in batch:
            self.reporter.note(f"{_label(cell)}, sample {item.index}: {reason}")
            self._save(cell, item, len(batch), error=reason)
        return []

    def _recover(self, reason: str) -> None:
        """Free memory after an error, or say that this process cannot go on."""
        if self.run.loaded.shards > 1:
            # the other processes of the model wait in the middle of a layer
            raise WorkerLost(reason)
        release()
        if reason != OOM and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise WorkerLost(f"the GPU gives no more results after {reason}") from error

    @contextlib.contextmanager
    def _attached(self, cell: Cell) -> Iterator[Any]:
        if not cell.method.ids:
            yield None
            return
        with self.run.attach(self.run.loaded.model, **cell.method.attach_arguments()) as dock:
            yield dock

    def _warm_up(self, cell: Cell, item: Item, dock: Any) -> None:
        """Run each method once and forget it: first calls pay for set-up and compilation."""
        if cell.method.method_id in self._warm:
            return
        self._warm.add(cell.method.method_id)
        warm_up = replace(WARM_UP, likelihood=item.likelihood)
        try:
            with within(self.run.time_limit):
                self._generator.run([item.ids], warm_up, dock, tails=[item.n_tail])
        except KVDockError:
            raise
        except Exception as error:
            # the sample itself meets the same error, and that one is recorded
            traceback.clear_frames(error.__traceback__)
            self._recover(OOM if is_oom(error) else f"{type(error).__name__}: {error}"[:500])

    def _limit(self, cell: Cell) -> int:
        return self._sizes.limit(cell.method.method_id, cell.length)

    def _settings(self, cell: Cell, batch: list[Item]) -> Settings:
        config = self.run.plan.config
        return Settings(
            max_new_tokens=config.max_new_tokens(cell.task),
            do_sample=config.generation.do_sample,
            stop=config.generation.stop,
            likelihood=batch[0].likelihood,
            seed=int(self.run.key(cell, batch[0].index)[:8], 16),
        )

    def _save(
        self,
        cell: Cell,
        item: Item,
        batch_size: int,
        *,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> None:
        self.run.save(cell, item, answer=answer, batch_size=batch_size, error=error)
        self.reporter.advance(cell.length, 1, _label(cell))

    def _log_error(self, cell: Cell, batch: list[Item]) -> None:
        indices = ", ".join(str(item.index) for item in batch)
        self.run.sink.log(f"{_label(cell)}, samples {indices}\n{traceback.format_exc()}\n")


def _label(cell: Cell) -> str:
    return f"{cell.length} {cell.task.name}, {cell.method.label}"
