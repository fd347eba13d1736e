"""Block-sparse attention through torch's FlexAttention, compiled on first use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockLists
from kvdock.kernels.sparse import check_call
from kvdock.kernels.sparse_check import trust
from kvdock.policy import AttentionParams

HEAD_DIMS = (64, 96, 128)
PROGRAMS = 64
"""Torch compiles anew for one query, one block, one row, one head, and every head_dim and dtype."""
FORWARD_ONLY: dict[str, Any] = (
    {"compute_q_blocks": False}
    if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
    else {}
)
"""Leave out the transposed lists, which only a backward pass reads, where torch can."""


class FlexSparse:
    """Call compiled ``flex_attention``; the diagonal is its partial block, the rest are full."""

    name = "flex"

    def __init__(self, attention: Callable[..., Any]) -> None:
        self._attention = attention

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: BlockLists,
        params: AttentionParams,
    ) -> Tensor:
        """Attend over the listed blocks; see `SparseBackend.attend`."""
        grid = check_call(query, key, value, lists, params)
        # its query blocks start at the first query, ours at a multiple of the block
        lead = grid.offset % grid.block
        if lead:
            query = F.pad(query, (0, 0, lead, 0))
        # a tensor, so that another offset is no other program
        past = torch.full((), grid.first * grid.block, dtype=torch.int32, device=query.device)
        lengths = (query.shape[2], grid.keys)
        # by default torch gives up after eight, which a batch after another model may reach
        with torch._dynamo.config.patch(recompile_limit=PROGRAMS):
            output: Tensor = self._attention(
                query,
                key,
                value,
                block_mask=_block_mask(lists, past, lengths),
                scale=params.scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output[:, :, lead:].transpose(1, 2).contiguous()


def load_flex(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> FlexSparse:
    """Return the backend, tried on a small case; raises where it cannot serve."""
    if device.type != "cuda":
        raise UnsupportedError(
            f"it is served on GPUs only (the model is on {device.type!r}); elsewhere torch would"
            " compile C++ for half a minute first"
        )
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in HEAD_DIMS or block != 128:
        raise UnsupportedError(
            f"it serves float16 and bfloat16, head_dim {', '.join(map(str, HEAD_DIMS))}, blocks of"
            f" 128; found {dtype}, {head_dim} and {block}"
        )
    backend = _backend()
    trust(backend, device, head_dim, block)
    return backend


@cache
def _backend() -> FlexSparse:
    # without fullgraph torch may fall back to its uncompiled form, which attends densely
    return FlexSparse(torch.compile(flex_attention, dynamic=True, fullgraph=True))


def _block_mask(lists: BlockLists, past: Tensor, lengths: tuple[int, int]) -> BlockMask:
    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + past

    index = lists.index.contiguous()
    others = (lists.count - 1).clamp(min=0)
    last = index.gather(-1, others[..., None].long()).expand_as(index).contiguous()
    return BlockMask.from_kv_blocks(
        (lists.count > 0).int(),
        last,
        others,
        index,
        BLOCK_SIZE=lists.block,
        mask_mod=causal,
        seq_lengths=lengths,
        **FORWARD_ONLY,
    )
