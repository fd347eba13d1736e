"""Block-sparse attention through flashinfer's wrapper for blocks of unequal size.

The wrapper knows one pattern per key/value head, so that keys and values are repeated for every
query head; it lists single tokens, and its planning waits for the device. It is there to compare
with, and is taken only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockGrid, BlockLists, mask_from_lists
from kvdock.kernels.sparse import check_call
from kvdock.kernels.sparse_check import trust
from kvdock.policy import AttentionParams

HEAD_DIMS = (64, 128)
WORKSPACE = 128 * 2**20
LARGEST_LISTS = 2**27
"""Listed tokens over all heads: the wrapper holds four bytes for each, here and on the host."""


class FlashInferSparse:
    """Plan and run one prefill per row; every block row of a head is a sequence of its own.

    Its keys are the listed blocks, in order and with the diagonal last, so that causality within
    the sequence, the last query aligned with the last key, is causality within the prompt.
    """

    name = "flashinfer"

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper

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
        listed = int(lists.count.sum()) * grid.block // query.shape[0]
        if listed > LARGEST_LISTS:
            raise UnsupportedError(
                f"flashinfer would hold lists of {listed} tokens per prompt, of {LARGEST_LISTS} at"
                " most. Use backend='triton', or a sparser setting."
            )
        mask = mask_from_lists(lists, grid.key_blocks)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        rows = [
            self._attend_row(*states, grid, params.scaling)
            for states in zip(query, key, value, mask, strict=True)
        ]
        output = torch.stack(rows)
        empty = _spread(lists.count == 0, grid)
        return output.masked_fill(empty[..., None], 0.0).transpose(1, 2).contiguous()

    def _attend_row(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        grid: BlockGrid,
        scaling: float,
    ) -> Tensor:
        heads, device = query.shape[0], query.device
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        wrapper = self._wrapper(workspace)
        row_sizes, column_sizes = _sizes(grid, device)
        wrapper.plan(
            mask,
            row_sizes.expand(heads, -1).contiguous(),
            column_sizes.expand(heads, -1).contiguous(),
            num_qo_heads=heads,
            num_kv_heads=heads,
            head_dim=query.shape[-1],
            causal=True,
            sm_scale=scaling,
            q_data_type=query.dtype,
        )
        output: Tensor = wrapper.run(query.contiguous(), key, value)
        return output


def load_flashinfer(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> FlashInferSparse:
    """Return the backend, tried on a small case; raises where it cannot serve."""
    if device.type != "cuda":
        raise UnsupportedError(f"it needs an NVIDIA GPU, the model is on {device.type!r}")
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"it serves float16 and bfloat16 with head_dim {', '.join(map(str, HEAD_DIMS))}, found"
            f" {dtype} and {head_dim}"
        )
    backend = _backend()
    trust(backend, device, head_dim, block)
    return backend


@cache
def _backend() -> FlashInferSparse:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    return FlashInferSparse(VariableBlockSparseAttentionWrapper)


def _sizes(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of every block row of queries and of every block of keys, int32."""
    begin = torch.arange(grid.key_blocks, dtype=torch.int32, device=device) * grid.block
    columns = (grid.keys - begin).clamp(max=grid.block)
    rows = columns[grid.first :].clone()
    rows[0] -= grid.offset % grid.block
    return rows, columns


def _spread(rows: Tensor, grid: BlockGrid) -> Tensor:
    """Spread [b, H, M] over the queries, [b, H, Q]."""
    position = torch.arange(grid.offset, grid.keys, device=rows.device)
    return rows[..., position // grid.block - grid.first]
