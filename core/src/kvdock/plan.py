"""What one `attach` decided: the policies, the budget and the kernels a cache works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvdock.budget import Budget
from kvdock.errors import UnsupportedError
from kvdock.kernels import DenseBackend
from kvdock.layout import BatchLayout
from kvdock.policy import AttentionParams, AttentionPolicy, CachePolicy, ModelFacts
from kvdock.storage_policy import ChannelPolicy, FormatPolicy, StoragePolicy

if TYPE_CHECKING:
    from kvdock.decode import DecodeMode


@dataclass(eq=False)
class DockPlan:
    """Hold the decisions of one attachment; shared, never copied, by all its caches.

    Args:
        cache_policy: None keeps every entry (sparse prefill alone).
        attention_policy: None means dense prefill.
        channel_policy, format_policy: None where entries are stored as the model made them.
        managed: model layer indices whose cache kvdock holds, in order.
        decode: how decode steps of ``generate()`` run; None means eagerly.
    """

    methods: tuple[str, ...]
    cache_policy: CachePolicy | None
    attention_policy: AttentionPolicy | None
    budget: Budget
    backend: DenseBackend
    fallback: DenseBackend
    facts: ModelFacts
    config: Any
    managed: tuple[int, ...]
    channel_policy: ChannelPolicy | None = None
    format_policy: FormatPolicy | None = None
    decode: DecodeMode | None = None
    attached: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> DockPlan:
        """Return self, so that copying a cache does not copy the model's config and policies."""
        return self

    @property
    def window(self) -> int:
        """Return the number of last prompt queries the policies read."""
        readers = (self.cache_policy, self.channel_policy)
        return max((reader.query_window for reader in readers if reader is not None), default=0)

    @property
    def storage_policy(self) -> StoragePolicy | None:
        """Return the policy whose storage holds the entries; None for dense storage."""
        return self.format_policy or self.channel_policy

    def check_formatted(self, params: AttentionParams) -> None:
        """Refuse a model whose scores a storage policy's kernels cannot compute."""
        if not params.plain:
            raise UnsupportedError(
                f"{'+'.join(self.methods)} attends over packed entries with plain scaled scores;"
                " this model caps its scores or has learned sinks. Use a method that stores"
                " entries as they are, such as snapkv."
            )

    def layer_slots(self, tokens: int, slot_bytes: int) -> Sequence[int]:
        """Return each managed layer's allowance for a row of ``tokens`` tokens.

        Args:
            slot_bytes: bytes of one slot over the whole cache (layers, rows, heads).
        """
        layers = len(self.managed)
        if self.cache_policy is None:
            return [tokens] * layers
        slots = self.budget.slots(tokens, slot_bytes=slot_bytes)
        if slots >= tokens:
            return [max(slots, 1)] * layers
        return self.cache_policy.layer_slots(tokens, slots, layers)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the last queries of clean rows: [b, H, Q, D] → [b, Q, H, D].

        The second value is the log-sum-exps [b, H, Q], where the cache policy reads them and the
        kernel gives them.
        """
        if self.attention_policy is not None:
            output = self.attention_policy.prefill(query, key, value, params, layer=layer)
            if output is not None:
                return output, None
        if not params.plain:
            return self.fallback.attend(query, key, value, params), None
        if self.cache_policy is not None and self.cache_policy.reads_lse:
            return self.backend.attend_lse(query, key, value, params)
        return self.backend.attend(query, key, value, params), None

    def prefill_ragged(
        self,
        rows: Sequence[tuple[Tensor, Tensor, Tensor]],
        layout: BatchLayout,
        output: Tensor,
        params: AttentionParams,
        layer: int,
    ) -> None:
        """Attend row by row over compacted rows, in one varlen call where the backend has one."""
        spans = [span for span in layout.spans or [] if span.count]
        if self.attention_policy is None and params.plain and self.backend.ragged is not None:
            for span, states in zip(spans, self.backend.ragged(rows, params), strict=True):
                span.put(output, states)
            return
        for span, (query, key, value) in zip(spans, rows, strict=True):
            span.put(output, self.prefill(query, key, value, params, layer)[0])
