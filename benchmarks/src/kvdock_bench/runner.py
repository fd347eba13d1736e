"""The run loop: prompts once for all methods, batches, out-of-memory, one record per answer."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvdock.errors import KVDockError
from kvdock_bench.batches import Item, make_batches
from kvdock_bench.context import check_prompt, context_of
from kvdock_bench.fitting import fit_sample
from kvdock_bench.generate import Answer, Generator, Settings
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
            loaded.model, loaded.tokenizer, loaded.shape, loaded.item_bytes
        )
        self._warm: set[str] = set()
        self._limits: dict[str, int] = {}

    def __call__(self) -> None:
        """Go through the cells from short to long; each prompt is made once for all methods."""
        for length, task, cells in self.run.plan.groups():
            missing = [(cell, self.run.missing(cell)) for cell in cells]
            wanted = sorted({index for _, indices in missing for index in indices})
            items = {index: self._prepare(task, length, index) for index in wanted}
            for cell, indices in missing:
                self._run_cell(cell, [items[index] for index in indices])

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

    def _run_cell(self, cell: Cell, items: list[Item]) -> None:
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
                    limit = self._limits[cell.method.method_id] = max(map(len, halves))
                    rest = [item for later in queue for item in later]
                    padding = cell.method.supports_padding
                    queue = halves + make_batches(rest, limit, padding=padding)

    def _run_batch(self, cell: Cell, batch: list[Item], dock: Any) -> list[list[Item]]:
        """Record a batch; returns its halves instead when memory ran out and it can be split."""
        try:
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
            if reason != OOM:
                self._log_error(cell, batch)
            # the traceback's frames hold the batch's tensors
            traceback.clear_frames(error.__traceback__)
        else:
            for item, answer in zip(batch, answers, strict=True):
                self._save(cell, item, len(batch), answer=answer)
            return []
        release()
        if reason == OOM and len(batch) > 1:
            half = (len(batch) + 1) // 2
            self.reporter.note(f"Out of memory with a batch of {len(batch)}: trying {half}.")
            return [batch[:half], batch[half:]]
        for item in batch:
            self.reporter.note(f"{_label(cell)}, sample {item.index}: {reason}")
            self._save(cell, item, len(batch), error=reason)
        return []

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
            self._generator.run([item.ids], warm_up, dock, tails=[item.n_tail])
        except KVDockError:
            raise
        except Exception as error:
            # the sample itself meets the same error, and that one is recorded
            traceback.clear_frames(error.__traceback__)
            release()

    def _limit(self, cell: Cell) -> int:
        chosen = self.run.plan.config.batch_size
        if chosen == "auto":
            chosen = 16 if self.run.loaded.model.device.type == "cuda" else 4
        return self._limits.get(cell.method.method_id, chosen)

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
        with self.run.error_log.open("a", encoding="utf-8") as file:
            indices = ", ".join(str(item.index) for item in batch)
            file.write(f"{_label(cell)}, samples {indices}\n{traceback.format_exc()}\n")


def _label(cell: Cell) -> str:
    return f"{cell.length} {cell.task.name}, {cell.method.label}"
