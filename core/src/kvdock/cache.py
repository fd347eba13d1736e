"""The transformers `Cache` whose layers hand themselves to attention and keep what a policy keeps.

Shapes: B rows, H query heads, K key/value heads, Q new columns, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvdock.compat import passthrough_layers
from kvdock.errors import UnsupportedError
from kvdock.layer import LayerStore
from kvdock.plan import DockPlan
from kvdock.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class KVHandle:
    """Stand for a layer's keys and values between `update` and the attention function."""

    layer: Any
    key: Tensor
    value: Tensor


class DockLayer(CacheLayerMixin):
    """Present one layer to transformers in columns (pads included); its store holds real tokens."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, session: Session, rank: int) -> None:
        super().__init__()
        self.session = session
        self.rank = rank

    @property
    def store(self) -> LayerStore:
        """Return what the layer holds."""
        return self.session.stores[self.rank]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Mark the layer ready; memory is allocated where the tokens are stored."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return a handle twice; the attention function takes the states from it."""
        if not self.session.plan.attached:
            raise UnsupportedError(
                "this cache belongs to a dock that was detached. Attach again for a new cache."
            )
        self.is_initialized = True
        handle = KVHandle(self, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        """Return the columns seen, pads and evicted tokens included."""
        return self.store.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the logical length and offset; physical slots never show here."""
        return self.store.columns + query_length, 0

    def get_max_length(self) -> int:
        """Return −1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.session.thaw()
        self.session.stores[self.rank] = self.session.new_store(self.rank)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows of every tensor for beam search."""
        self.session.thaw()
        self.store.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.session.thaw()
        self.store.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.session.thaw()
        self.store.repeat_rows(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: evicted entries cannot be brought back."""
        if tokens_to_remove:
            _refuse_crop()

    def activate_past_recording(self) -> None:
        """Refuse, for the same reason; assisted decoding calls this first."""
        _refuse_crop()

    def offload(self) -> None:
        """Refuse: a layer commits its memory after attention, not in `update`."""
        raise UnsupportedError("a DockCache cannot be offloaded; it is small by being compressed.")

    prefetch = offload


class DockCache(Cache):
    """Hold the compressed cache of one conversation (or batch of them) with one attached model.

    Args:
        prompt_length: columns of the prompt, when it comes in several forwards; None means that the
            first forward is the whole prompt.
    """

    def __init__(self, plan: DockPlan, prompt_length: int | None = None) -> None:
        self.plan = plan
        self.session = Session(plan, prompt_length)
        layers = passthrough_layers(plan.config)
        for rank, index in enumerate(plan.managed):
            layers[index] = DockLayer(self.session, rank)
        super().__init__(layers=layers)

    @property
    def docked(self) -> list[DockLayer]:
        """Return the managed layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, DockLayer)]

    def end_prefill(self) -> None:
        """Mark the end of the prompt; layers still uncompressed are compressed now."""
        self.session.end_prefill()

    def reset(self) -> None:
        """Forget everything; the next forward is a first prompt again."""
        super().reset()
        self.session.prompt_columns, self.session.turn = None, 0


def _refuse_crop() -> None:
    raise UnsupportedError(
        "assisted and prompt-lookup decoding take tokens back from the cache, which a compressed"
        " cache cannot do. Generate without assistant_model / prompt_lookup_num_tokens, or detach."
    )
