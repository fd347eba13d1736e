"""What one run works with, and how an answer becomes its record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdock_bench.batches import Item
from kvdock_bench.generate import Answer
from kvdock_bench.models import Loaded
from kvdock_bench.plan import Cell, Plan, record_key
from kvdock_bench.prompting import Prompter
from kvdock_bench.protocol import make_protocol, protocol_id, stop_ids
from kvdock_bench.record import Record
from kvdock_bench.records import RecordStore
from kvdock_bench.scoring import score
from kvdock_bench.sources import TaskData

Attach = Callable[..., contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """All that the loop works with.

    Args:
        identity: what every record's key has in common.
        attach: `kvdock.attach`, or a stand-in.
        device: the name written into records.
        generator: what answers; None: the loaded model itself.
    """

    plan: Plan
    loaded: Loaded
    prompter: Prompter
    data: TaskData
    store: RecordStore
    identity: dict[str, Any]
    attach: Attach
    device: str
    error_log: Path
    generator: Any = None

    def key(self, cell: Cell, index: int) -> str:
        """Return the key of one answer."""
        return record_key(self.identity, cell, self.plan.config, index)

    def missing(self, cell: Cell) -> list[int]:
        """Return the indices of a cell's samples that are still to do."""
        count = self.plan.count(cell.task.name)
        return [i for i in range(count) if not self.store.is_finished(self.key(cell, i))]

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
        self.store.append(cell.name, record)
