"""The progress of one cache: which turn it is in, where its prompt ends, what its layers hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvdock.decode import Decoder
from kvdock.formatted import FormattedStore
from kvdock.layer import LayerStore
from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, RevisionView


@dataclass(eq=False)
class Session:
    """Lead every layer of one cache through prompts and steps.

    The layers' presenters (`DockLayer`) hold the session, never the cache, so that dropping a cache
    frees its memory at once instead of at the next garbage collection.

    Args:
        prompt_columns: the column where the present prompt ends; None until the first forward,
            which then is the whole prompt.
        generating: inside ``generate()``, where every column of a decode step is real.
    """

    plan: DockPlan
    prompt_columns: int | None = None
    turn: int = 0
    generating: bool = False
    stores: list[LayerStore] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    """What a policy shares between layers during one prompt."""
    decoder: Decoder | None = None
    """What leads the decode steps of the present ``generate()``; None: each layer for itself."""

    def __post_init__(self) -> None:
        self.stores = [self.new_store(rank) for rank in range(len(self.plan.managed))]

    def new_store(self, rank: int) -> LayerStore:
        """Return the empty store of one layer."""
        dense = self.plan.storage_policy is None
        return LayerStore(self.plan, rank) if dense else FormattedStore(self.plan, rank)

    @property
    def columns(self) -> int:
        """Return the columns the first layer has seen."""
        return self.stores[0].columns

    def begin_turn(self, prompt_columns: int) -> None:
        """Say that the prompt of this turn ends at column ``prompt_columns``."""
        self.thaw()
        if self.prompt_columns is not None and self.columns:
            self.turn += 1
        self.prompt_columns = prompt_columns
        self.shared = {}

    def attend(
        self,
        rank: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: BatchLayout,
        params: AttentionParams,
    ) -> Tensor:
        """Run one layer's part of a forward: a step of decode, or a piece of a prompt.

        Args:
            query: [B, H, Q, D]; key, value: [B, K, Q, D], the forward's own.

        Returns:
            [B, Q, H, D].
        """
        if self.decoder is not None and self.decoder.frozen is not None:
            if self.decoder.stepping:
                return self.decoder.frozen.attend(rank, query, key, value, params, self.shared)
            self.thaw()
        store = self.stores[rank]
        columns = store.columns + layout.columns
        if self.prompt_columns is None:
            self.prompt_columns = columns
        decoding = store.columns >= self.prompt_columns
        # Outside generate() a single column may be a pad, so the layout has to be read.
        one_each = layout.columns == 1 and (self.generating or layout.spans is None)
        if decoding and one_each:
            if not self.generating:
                layout.check_past(store.ledger.tokens)
            store.columns = columns
            return store.step(query, key, value, params, self.shared)
        if decoding:
            self.begin_turn(columns)
        store.columns = columns
        last = columns >= self.prompt_columns
        output = store.extend(
            query, key, value, layout, params, room=max(columns, self.prompt_columns)
        )
        if last:
            store.finish(self.turn, self.shared)
            self._revise(rank)
        return output

    def thaw(self) -> None:
        """Let the host lead the layers again; what a decoder captured is freed."""
        if self.decoder is not None:
            self.decoder.release()

    def end_prefill(self) -> None:
        """End the prompt here; layers that wait for its end are compressed now."""
        for rank, store in enumerate(self.stores):
            if store.open:
                store.finish(self.turn, self.shared)
                self._revise(rank)
        self.prompt_columns = self.columns

    def _revise(self, rank: int) -> None:
        """Let the policy shrink earlier layers, now that it has seen this one."""
        policy = self.plan.cache_policy
        if policy is None or not policy.revises:
            return
        seen = self.stores[: rank + 1]
        changes: dict[int, dict[int, Any]] = {}
        for row in range(len(seen[0].ledger.tokens)):
            view = RevisionView(
                layer=rank,
                layers=len(self.stores),
                row=row,
                lengths=tuple(store.storage.live[row] for store in seen),
                slot_state=tuple(store.dense.slot_state(row) for store in seen),
                turn=self.turn,
                shared=self.shared,
            )
            for layer, choice in policy.revise(view).items():
                changes.setdefault(layer, {})[row] = choice
        for layer, choices in changes.items():
            self.stores[layer].shrink(choices)
