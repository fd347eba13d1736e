"""What one run works with, and how an answer becomes its record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kvdock_bench.batches import Item
from kvdock_bench.generate import Answer
from kvdock_bench.models import Loaded
from kvdock_bench.plan import Cell, Plan, record_key
from kvdock_bench.prompting import Prompter
from kvdock_bench.protocol import make_protocol, protocol_id, stop_ids
from kvdock_bench.record import Record
from kvdock_bench.scoring import score
from kvdock_bench.sources import TaskData

Attach = Callable[..., contextlib.AbstractContextManager[Any]]


class Sink(Protocol):
    """Where answers go: the run's folder, or the process that writes it."""

    def append(self, cell: str, record: Record) -> None:
        """Take the record of one answer; ``cell`` is its place in the run folder."""

    def log(self, text: str) -> None:
        """Take the traceback of an unexpected error."""


@dataclass(frozen=True, slots=True)
class Run:
    """All that the loop works with.

    Args:
        identity: what every record's key has in common.
        attach: `kvdock.attach`, or a stand-in.
        device: the name written into records.
        time_limit: seconds that one answer may take; None for any.
        generator: what answers; None: the loaded model itself.
    """

    plan: Plan
    loaded: Loaded
    prompter: Prompter
    data: TaskData
    sink: Sink
    identity: dict[str, Any]
    attach: Attach
    device: str
    time_limit: float | None = None
    generator: Any = None

    def key(self, cell: Cell, index: int) -> str:
        """Return the key of one answer."""
        return record_key(self.identity, cell, self.plan.config, index)

    def save(
        self,
        cell: Cell,
        item: Item,
        *,
        batch_size: int,
        answer: Answer | None = None,
        error: str | None = None,
    ) -> None:
        """Score an answer and store it, or store why there is none."""
        protocol = make_protocol(
            self.plan.config,
            cell.task.name,
            cell.method,
            template_id=self.prompter.template_id,
            stops=stop_ids(self.loaded.model),
        )
        record = Record(
            key=self.key(cell, item.index),
            method_id=cell.method.method_id,
            method=cell.method.label,
            task=cell.task.name,
            length=cell.length,
            index=item.index,
            seed=self.plan.config.seed,
            prompt_sha=item.sha,
            n_prompt_tokens=len(item.ids),
            units=item.units,
            references=item.references,
            data_source=cell.task.data_source(self.data),
            device=self.device,
            batch_size=batch_size,
            error=error,
            protocol=protocol,
            protocol_id=protocol_id(protocol),
            meta=item.meta,
        )
        if answer is not None:
            meta = {**item.meta, **answer.meta}
            record = dataclasses.replace(
                record,
                meta=meta,
                prediction=answer.text,
                score=score(cell.task.metric, answer.text, item.references, meta),
                n_new_tokens=answer.n_new_tokens,
                finish_reason=answer.finish_reason,
                timings=answer.timings,
                memory=answer.memory,
            )
        self.sink.append(cell.name, record)
