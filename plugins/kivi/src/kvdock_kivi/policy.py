"""KIVI as a format of kept entries (sections 3 and 4 of the paper)."""

from __future__ import annotations

import torch

from kvdock.errors import UnsupportedError
from kvdock.policy import ModelFacts
from kvdock.storage_policy import FormatPolicy, StoreShape
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.options import KiviOptions
from kvdock_kivi.storage import KiviStorage

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KiviPolicy(FormatPolicy):
    """Quantise keys per channel and values per token, all but the newest tokens."""

    fixed_steps = True

    def __init__(self, options: KiviOptions) -> None:
        self.options = options

    @property
    def active(self) -> bool:
        """Say whether anything is packed."""
        return self.options.bits != 16

    @property
    def geometry(self) -> Geometry:
        """Return the packed layout."""
        options = self.options
        return Geometry(options.bits, options.group_size, options.residual_length)

    def bind(self, facts: ModelFacts) -> None:
        """Refuse a head size that groups do not divide, and number formats other than floats."""
        if not self.active:
            return
        group = self.options.group_size
        if facts.head_dim is not None and facts.head_dim % group:
            raise UnsupportedError(
                f"kivi: head_dim is {facts.head_dim}, expected a multiple of group_size, {group}:"
                " a group of value channels must not leave its head. Use a smaller group_size, or"
                " bits=16."
            )
        if facts.dtype is not None and facts.dtype not in DTYPES:
            raise UnsupportedError(
                f"kivi: the model is {facts.dtype}, expected float32, float16 or bfloat16."
            )

    def make_storage(self) -> KiviStorage:
        """Return the empty storage of one layer."""
        return KiviStorage(self.geometry)

    def predicted_nbytes(self, shape: StoreShape, capacity: int) -> int:
        """Return codes, scales, zeros and the newest tokens of all rows and heads."""
        key_dim = shape.key_dim if shape.channels is None else shape.channels
        full = (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
        row = self.geometry.nbytes(capacity, key_dim, shape.value_dim, full)
        return shape.batch * shape.kv_heads * row
