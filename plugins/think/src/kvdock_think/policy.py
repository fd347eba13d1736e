"""ThinK's choice of channels and what its storage takes; section 3 of the paper."""

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.selection import top_positions
from kvdock.policy import ModelFacts, PrefillView
from kvdock.storage_policy import ChannelPolicy, StoreShape
from kvdock_think.channels import channel_scores, kept_channels
from kvdock_think.options import ThinKOptions
from kvdock_think.storage import ThinKStorage

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


class ThinKPolicy(ChannelPolicy):
    """Keep the D' channels of every key/value head with the highest score.

    score s[k, i] = mean over window and group of q[·, i]² · mean over kept tokens of K[k, ·, i]²
    """

    fixed_steps = True

    def __init__(self, options: ThinKOptions) -> None:
        self.options = options
        self.query_window = options.window

    @property
    def active(self) -> bool:
        """Say whether any channel is dropped."""
        return self.options.ratio > 0

    def bind(self, facts: ModelFacts) -> None:
        """Refuse a head size or data type the storage does not serve."""
        if facts.dtype is not None and facts.dtype not in DTYPES:
            raise UnsupportedError(
                f"think stores float32, float16 or bfloat16; the model is {facts.dtype}. Load it"
                " in one of these."
            )
        if facts.head_dim is not None:
            self.kept_channels(facts.head_dim)

    def kept_channels(self, head_dim: int) -> int:
        """Return D', or raise ``UnsupportedError`` where it is not less than the head size."""
        if head_dim % 8 or not 0 < head_dim <= LARGEST_HEAD:
            raise UnsupportedError(
                f"think serves head sizes that are multiples of 8 up to {LARGEST_HEAD}; the model"
                f" has {head_dim}."
            )
        kept = kept_channels(head_dim, self.options.ratio)
        if self.active and kept == head_dim:
            raise UnsupportedError(
                f"think: ratio={self.options.ratio} drops no channel of a head of {head_dim}, as"
                " the kept ones are rounded up to a multiple of 16 (of a quarter of small heads)."
                " Raise ratio, or set it to 0 for the plain cache."
            )
        return kept

    def select_channels(self, view: PrefillView) -> Tensor:
        """Return the kept channels of every row and key/value head, int64 [b, K, D']."""
        assert view.queries is not None
        scores = channel_scores(view.queries, view.keys)
        return top_positions(scores, self.kept_channels(view.keys.shape[-1]))

    def make_storage(self) -> ThinKStorage:
        """Return the empty storage of one layer."""
        return ThinKStorage(self.options.recent, self.options.block)

    def predicted_nbytes(self, shape: StoreShape, capacity: int) -> int:
        """Return the bytes of D' channels of all keys, the rest of the last ones, and all values.

        B · K · s · (capacity · (D' + Dv) + min(capacity, recent + block) · (D − D'))
        """
        kept = self.kept_channels(shape.key_dim) if shape.channels is None else shape.channels
        slots = min(capacity, self.options.recent + self.options.block)
        numbers = capacity * (kept + shape.value_dim) + slots * (shape.key_dim - kept)
        return shape.batch * shape.kv_heads * numbers * shape.dtype.itemsize
