"""The tensors of one layer's packed cache, and how much of each a row uses.

Shapes: B rows, K key/value heads, C capacity in tokens, D head_dim, Dk packed key channels, Dv
value channels, R residual, g group, P·n tokens of a block, n of a plane, Wk and Wv blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvdock_kivi.geometry import Geometry


@dataclass
class Packed:
    """Hold one layer's codes, scales and newest tokens.

    Args:
        key_codes: int16 [B, K, Wk, n, Dk]. key_scale, key_zero: float16 [B, K, C/g, Dk].
        value_codes: int16 [B, K, Wv, n, Dv].
        value_scale, value_zero: float16 [B, K, Wv, Dv/g, P·n].
        key_rest, value_rest: [B, K, min(C, R), D]; token t stands in slot t mod R.
    """

    key_codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_codes: Tensor
    value_scale: Tensor
    value_zero: Tensor
    key_rest: Tensor
    value_rest: Tensor

    @classmethod
    def empty(
        cls,
        geometry: Geometry,
        lead: tuple[int, int],
        capacity: int,
        dims: tuple[int, int, int],
        like: Tensor,
    ) -> Packed:
        """Allocate for ``capacity`` tokens a row; ``dims`` are D, Dk and Dv."""
        dim, key_dim, value_dim = dims
        g, n, block = geometry.group, geometry.plane, geometry.block
        windows, blocks = geometry.key_tokens(capacity), geometry.value_blocks(capacity)

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=like.device)

        return cls(
            zeros(windows // block, n, key_dim, dtype=torch.int16),
            zeros(windows // g, key_dim),
            zeros(windows // g, key_dim),
            zeros(blocks, n, value_dim, dtype=torch.int16),
            zeros(blocks, value_dim // g, block),
            zeros(blocks, value_dim // g, block),
            zeros(geometry.rest(capacity), dim, dtype=like.dtype),
            zeros(geometry.rest(capacity), value_dim, dtype=like.dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def grown(self, geometry: Geometry, capacity: int) -> Packed:
        """Return the same with room for ``capacity`` tokens; only tensors that grow are copied."""
        dims = self.key_rest.shape[-1], self.key_codes.shape[-1], self.value_codes.shape[-1]
        batch, kv_heads = self.key_codes.shape[:2]
        meta = torch.empty(0, dtype=self.key_rest.dtype, device="meta")
        wanted = Packed.empty(geometry, (batch, kv_heads), capacity, dims, meta).tensors()
        return Packed(
            **{name: _with_room(old, wanted[name]) for name, old in self.tensors().items()}
        )

    def select_rows(self, index: Tensor) -> Packed:
        """Return the rows named, in that order."""
        index = index.to(self.key_codes.device)
        return Packed(**{name: x.index_select(0, index) for name, x in self.tensors().items()})


def _with_room(old: Tensor, wanted: Tensor) -> Tensor:
    if old.shape == wanted.shape:
        return old
    new = old.new_zeros(wanted.shape)
    new[:, :, : old.shape[2]] = old
    return new
