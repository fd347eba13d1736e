"""The contracts between a method and the core: policies decide, the core moves memory.

Shapes: B rows of the batch, b rows of one view, H query heads, K key/value heads, N stored entries,
C kept entries, W queries of the observation window, D head_dim.

A policy never sees a pad. The core hands it rows whose entries are all real tokens, in the order
of their positions, so a method is written once for a single clean sequence and is right for every
padded batch, chunked prefill and later turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvdock.shard import WHOLE, HeadShard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvdock.budget import Budget
    from kvdock.release import ReleaseRule


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Hold what a model passes to attention beside query, key and value."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Say whether softmax(q·k·scaling) is all there is."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Describe the attached model to a policy, once, before the first forward."""

    layers: int
    rotate: Callable[[Tensor, Tensor, int], Tensor] | None
    """``rotate(key [b, K, N, D], delta [b, N], layer)`` turns keys by ``delta`` positions."""
    rotate_reason: str = ""
    """Why ``rotate`` is None."""
    config: Any = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    turns: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """``turns(delta [b, N])``: cos and sin of ``rotate``, where it turns halves of whole heads."""
    shard: HeadShard = WHOLE
    """Which of the model's heads the views show; all of them but under tensor parallelism."""


@dataclass(frozen=True, slots=True)
class PrefillView:
    """Show one layer's full entries at the end of the prompt, before anything is dropped.

    Args:
        layer: rank among the managed layers, 0 = first (not the model's layer index).
        layers: number of managed layers.
        slots: entries this layer may keep per row and key/value head.
        queries: last ``min(query_window, new tokens)`` queries of the prompt, [b, H, W, D].
        keys, values: all candidates, [b, K, N, D], after RoPE.
        positions: true token positions, int64 [b, K, N], ascending.
        turn: 0 for the first prompt of the cache, then 1, 2, …
        rows: which rows of the batch these are.
        slot_state: the policy's own per-entry tensors, [b, K, N, ...].
        row_state: the policy's own per-row tensors, [b, ...].
        shared: the policy's own memory between the layers of one prompt.

        lse: log-sum-exp of every query's scaled scores, natural, float32 [b, H, W], where the
            policy ``reads_lse`` and the dense attention gave it.

    ``observe_prompt`` gets the same view during the prompt; ``queries`` are then the forward's own.
    """

    layer: int
    layers: int
    slots: int
    queries: Tensor | None
    keys: Tensor
    values: Tensor
    positions: Tensor
    params: AttentionParams
    turn: int
    rows: tuple[int, ...]
    slot_state: dict[str, Tensor] = field(default_factory=dict)
    row_state: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    lse: Tensor | None = None

    @property
    def length(self) -> int:
        """Return the number of candidates, N."""
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class Selection:
    """Say which entries stay; the core gathers them and frees the rest.

    Args:
        index: entries to keep, int64 [b, K, C], ascending along C (so positions stay sorted).
        keys, values: replacements for the gathered entries (merged or re-positioned), [b, K, C, D].
        slot_state: per-entry tensors aligned with the kept entries, [b, K, C, ...]; those the view
            showed are gathered by ``index`` without being named here.
        row_state: per-row tensors, [b, ...].
    """

    index: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    slot_state: dict[str, Tensor] = field(default_factory=dict)
    row_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RevisionView:
    """Show what one row holds in the layers done so far, right after ``layer`` was compressed.

    Args:
        lengths: entries the row holds in layers 0 … ``layer``.
        slot_state: per layer, the policy's per-entry tensors, [1, K, N, ...].
        shared: the policy's own memory between the layers of one prompt.
    """

    layer: int
    layers: int
    row: int
    lengths: tuple[int, ...]
    slot_state: tuple[dict[str, Tensor], ...]
    turn: int
    shared: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DecodeView:
    """Show one layer right after a decode step's attention, whole batch, N physical slots.

    A prompt is stored in the order of its positions; after that an entry keeps its slot until it is
    released, and the next token takes the released slot.

    Args:
        queries: the step's queries, [B, H, 1, D].
        keys, values: physical slots in storage order (not sorted), [B, K, N, D].
        positions: int32 [B, K, N]; −1 marks an empty slot.
        over: bool [B]: rows that hold one entry more than ``slots`` and must release one.
        slots: the rows' allowances, int64 [B].
        shared: the policy's own memory between layers; rows in it are not reordered for beams.
    """

    layer: int
    layers: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    over: Tensor
    slots: Tensor
    params: AttentionParams
    slot_state: dict[str, Tensor]
    row_state: dict[str, Tensor]
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Release:
    """Name the slot each row and head gives up; rows that are not ``over`` are ignored.

    Args:
        slot: int64 [B, K].
        rewrite_slots, rewrite_keys: slots whose keys change, int64 [B, K, R] and [B, K, R, D].
        row_state: per-row tensors replaced after the step, [B, ...].
    """

    slot: Tensor
    rewrite_slots: Tensor | None = None
    rewrite_keys: Tensor | None = None
    row_state: dict[str, Tensor] = field(default_factory=dict)


class BudgetAllocator(ABC):
    """Split a row's budget over the layers."""

    @abstractmethod
    def layer_slots(self, tokens: int, slots: int, layers: int) -> Sequence[int]:
        """Return the entries each of ``layers`` layers may keep of a row of ``tokens`` tokens.

        ``slots`` is the budget per layer and key/value head; layer-wise methods keep the sum
        ``slots * layers`` fixed.
        """


class CachePolicy(BudgetAllocator):
    """Decide which entries a cache keeps; subclass it once per method."""

    query_window: int = 0
    """Number of last prompt queries that ``select`` reads."""
    acts_on_decode: bool = False
    """Whether rows are held at their allowance during decode (``release`` is called)."""
    acts_on_later_turns: bool = False
    """Whether ``select`` runs again at the end of a second or later prompt on the same cache;
    it does anyway where ``acts_on_decode``.

    The allowance then follows all tokens seen, unless decode holds rows at their first one.
    """
    observes_prompt: bool = False
    """Whether ``observe_prompt`` sees every forward of a prompt, with all its queries."""
    reads_lse: bool = False
    """Whether ``observe_prompt`` makes use of the log-sum-exps of dense attention."""
    observes_decode: bool = False
    """Whether ``observe_step`` sees every decode step."""
    revises: bool = False
    """Whether ``select`` sets its own number of entries and ``revise`` may shrink layers later."""

    def bind(self, facts: ModelFacts) -> None:
        """Check that the model fits the method; raise ``UnsupportedError`` if it does not."""

    def check_budget(self, budget: Budget) -> None:
        """Refuse a budget the options cannot work with."""

    def layer_slots(self, tokens: int, slots: int, layers: int) -> Sequence[int]:
        """Give every layer the same allowance."""
        return [slots] * layers

    @abstractmethod
    def select(self, view: PrefillView) -> Selection | None:
        """Choose what to keep of ``view``; called only when the row is longer than its allowance.

        ``None`` keeps everything.
        """

    def observe_prompt(self, view: PrefillView) -> dict[str, Tensor]:
        """Return the per-entry state after one forward of the prompt, [b, K, N, ...] per name.

        New entries come with a zero state (no state at all in the first forward).
        """
        raise NotImplementedError(f"{type(self).__name__} sets observes_prompt without the method")

    def observe_step(self, view: DecodeView) -> dict[str, Tensor]:
        """Return the per-entry state after a decode step, [B, K, N, ...] per name."""
        raise NotImplementedError(f"{type(self).__name__} sets observes_decode without the method")

    def revise(self, view: RevisionView) -> dict[int, Selection]:
        """Choose what earlier layers give up of one row: layer rank → the entries that stay."""
        raise NotImplementedError(f"{type(self).__name__} sets revises without the method")

    def release(self, view: DecodeView) -> Release:
        """Choose the slot that each row over its allowance gives up after a decode step."""
        raise NotImplementedError(f"{type(self).__name__} sets acts_on_decode without release()")

    def release_rule(self, slots: Tensor) -> ReleaseRule | None:
        """Describe a layer's decode steps for allowances int64 [B]; None: `release` alone can."""
        return None

    def predicted_slots(self, tokens: int, slots: int, appended: int) -> int:
        """Predict the live entries of a row: ``tokens`` of prompt, then ``appended`` decode tokens.

        This is the method's own memory formula; ``Dock.report`` compares it with what is held.
        """
        kept = min(tokens, slots)
        return min(kept + appended, slots) if self.acts_on_decode else kept + appended


class AttentionPolicy(ABC):
    """Compute prefill attention in the method's own way; dense attention otherwise."""

    def bind(self, facts: ModelFacts, backend: str | None) -> None:  # noqa: B027  (optional)
        """Take the model's facts and the kernel `attach` was asked for, None for the fastest.

        Raise ``UnsupportedError`` where the model or the kernel does not fit.
        """

    @abstractmethod
    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        *,
        layer: int,
    ) -> Tensor | None:
        """Attend with the last queries of clean sequences of equal length.

        Args:
            query: [b, H, Q, D], the last Q tokens of each sequence.
            key, value: [b, K, N, D], all N ≥ Q tokens, in order. All three may be views of any
                strides.

        Returns:
            [b, Q, H, D], contiguous; None where dense attention should do it: a prompt too short
            to gain, or scores that are not ``params.plain``.
        """
