"""Block-sparse attention through flash-attn-4, on the chips whose kernel heeds the lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockLists
from kvdock.kernels.sparse import check_call
from kvdock.kernels.sparse_check import trust
from kvdock.policy import AttentionParams

BLOCK = 128
HEAD_DIMS = (64, 96, 128)


class FlashSparse:
    """Call ``flash_attn.cute`` with the diagonal in its masked list and the rest in its full list.

    Args:
        attention: the library's ``flash_attn_func``.
        tensors: its ``BlockSparseTensorsTorch``.
    """

    name = "flash-attn-4"

    def __init__(self, attention: Callable[..., Any], tensors: Callable[..., Any]) -> None:
        self._attention = attention
        self._tensors = tensors

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
        states = (_rows_contiguous(states.transpose(1, 2)) for states in (query, key, value))
        result = self._attention(
            *states,
            softmax_scale=params.scaling,
            causal=True,
            block_sparse_tensors=self._split(lists),
        )
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return (output[:, lead:] if lead else output).contiguous()

    def _split(self, lists: BlockLists) -> Any:
        """Mask the last listed block, the diagonal; the others are seen whole."""
        index = lists.index.contiguous()
        others = (lists.count - 1).clamp(min=0)
        last = index.gather(-1, others[..., None].long())
        listed = (lists.count > 0).int()
        return self._tensors(listed, last, others, index, block_size=(lists.block, lists.block))


def load_flash_sparse(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> FlashSparse:
    """Return the backend, tried on a small case; raises where it cannot serve."""
    if device.type != "cuda":
        raise UnsupportedError(f"it needs an NVIDIA GPU, the model is on {device.type!r}")
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        raise UnsupportedError(
            f"it needs compute capability 9.x, found {capability[0]}.{capability[1]}: older chips"
            " ignore the lists without a word, newer ones take blocks of 256 queries only"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"it needs float16 or bfloat16, the model is {dtype}")
    if head_dim not in HEAD_DIMS or block != BLOCK:
        raise UnsupportedError(
            f"it serves head_dim {', '.join(map(str, HEAD_DIMS))} in blocks of {BLOCK}, found"
            f" {head_dim} and {block}"
        )
    backend = _backend()
    trust(backend, device, head_dim, block)
    return backend


@cache
def _backend() -> FlashSparse:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return FlashSparse(flash_attn_func, BlockSparseTensorsTorch)


def _rows_contiguous(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
