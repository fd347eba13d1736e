"""Block-sparse attention in Triton: how the kernel is cut, launched and offered.

Shapes: b rows, H query heads, K key/value heads, Q queries, N keys, D head_dim.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockLists
from kvdock.kernels.sparse import check_call
from kvdock.kernels.sparse_rows_triton import attend_row
from kvdock.policy import AttentionParams

LOG2E = math.log2(math.e)
LARGEST_HEAD = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
SMALLEST_BLOCK = 16


@dataclass(frozen=True, slots=True)
class SparseTile:
    """Say how one program is cut.

    Args:
        queries: of a block, the rows of one program; keys: of a block, those of one step.
        registers: a cap per thread, so that two programs share a multiprocessor.
        descriptors: load keys and values by the tensor memory accelerator (Hopper and newer).
        by_head: run all rows of a key/value head before the next one's, rather than all heads of a
            row before the next row's.
    """

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 2
    registers: int | None = None
    descriptors: bool = False
    by_head: bool = True


class TritonSparse:
    """Attend over listed blocks with the kernel of `sparse_rows_triton`."""

    name = "triton"

    def __init__(self, tile: SparseTile | None = None) -> None:
        self.tile = tile

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: BlockLists,
        params: AttentionParams,
    ) -> Tensor:
        """Attend over the listed blocks; see `SparseBackend.attend`."""
        return block_sparse(query, key, value, lists, params, tile=self.tile)[0]


def load_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> TritonSparse:
    """Return the backend; raises ``UnsupportedError`` where the kernel cannot serve."""
    if device.type != "cuda":
        raise UnsupportedError(f"it needs a GPU that Triton compiles for, found {device.type!r}")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        raise UnsupportedError("it needs compute capability 8.0 or newer")
    if head_dim > LARGEST_HEAD.get(dtype, 0):
        raise UnsupportedError(
            f"it serves float16 and bfloat16 up to head_dim 256 and float32 up to 128, found"
            f" {dtype} and {head_dim}"
        )
    if block < SMALLEST_BLOCK:
        raise UnsupportedError(f"it needs blocks of {SMALLEST_BLOCK} or more, found {block}")
    return TritonSparse()


def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    params: AttentionParams,
    *,
    tile: SparseTile | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [b, Q, H, D] and, if asked for, the log-sum-exps, float32 [b, H, Q]."""
    grid = check_call(query, key, value, lists, params)
    query, key, value = (_rows_contiguous(states) for states in (query, key, value))
    index = _rows_contiguous(lists.index)
    count = lists.count.contiguous()
    b, heads, q_length, d = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    output = torch.empty(b, q_length, heads, d, dtype=query.dtype, device=query.device)
    lse = torch.empty(
        (b, heads, q_length) if with_lse else (b,), dtype=torch.float32, device=query.device
    )
    padded = max(16, triton.next_power_of_2(d))
    tile = tile or default_tile(query, lists.block)
    if tile.descriptors and not (takes_descriptors(key) and takes_descriptors(value)):
        tile = replace(tile, descriptors=False, registers=None)
    rows, keys = min(tile.queries, lists.block), min(tile.keys, lists.block)
    programs = (heads * grid.rows * (lists.block // rows),)
    with torch.cuda.device_of(query):
        for row in range(b):  # a row of its own: a descriptor spans one row's keys
            k_source: Any = key[row]
            v_source: Any = value[row]
            if tile.descriptors:
                k_source, v_source = (_descriptor(s, keys, padded) for s in (k_source, v_source))
            attend_row[programs](
                query[row], k_source, v_source, output[row], lse[row], count[row], index[row],
                *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3],
                *index.stride()[1:3], heads, grid.rows, grid.first, grid.offset, q_length, n,
                params.scaling * LOG2E,
                GROUP=heads // kv_heads, HEAD_DIM=d, PADDED=padded,
                BLOCK=lists.block, ROWS=rows, KEYS=keys, STAGES=tile.stages,
                DESCRIPTORS=tile.descriptors, BY_HEAD=tile.by_head,
                LSE=with_lse, UPCAST=_upcast(query),
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            )  # fmt: skip
    return output, lse if with_lse else None


def default_tile(query: Tensor, block: int) -> SparseTile:
    """Return a tile that fits the data type, the head and the device."""
    wide = query.shape[-1] > 128
    if query.dtype == torch.float32 or not query.is_cuda:
        return SparseTile(queries=32 if wide else 64, keys=32, warps=4, stages=1)
    if wide:
        return SparseTile(queries=64, keys=64, warps=4, stages=2)
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (9, 0):
        # 128 registers: two programs share a multiprocessor, and one multiplies meanwhile the other
        # takes exponentials
        return SparseTile(128, 64, warps=8, stages=2, registers=128, descriptors=True)
    return SparseTile(queries=128, keys=64, warps=4, stages=2)


def takes_descriptors(states: Tensor) -> bool:
    """Say whether the tensor memory accelerator can read [b, heads, N, D] row by row."""
    size = states.element_size()
    aligned = all(stride * size % 16 == 0 for stride in states.stride()[:3])
    near = states.shape[1] * states.stride(1) < 2**31
    return aligned and near and states.stride(-1) == 1 and states.data_ptr() % 16 == 0


def _descriptor(states: Tensor, keys: int, width: int) -> TensorDescriptor:
    """Describe [heads, N, D] as N rows whose columns reach over all heads, whatever the strides.

    Where ``width`` is more than D the added columns hold what lies behind a head: they meet zeros
    of the query, and columns of the output that are not stored.
    """
    heads, n, d = states.shape
    columns = (heads - 1) * states.stride(0) + d
    return TensorDescriptor(states, [n, columns], [states.stride(1), 1], [keys, width])


def _rows_contiguous(states: Tensor) -> Tensor:
    """Return states whose last dimension is contiguous, as the kernel's addresses assume."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _upcast(states: Tensor) -> bool:
    """Say whether to multiply in float32: the interpreter's NumPy knows no bfloat16."""
    return os.environ.get("TRITON_INTERPRET") == "1" and states.dtype == torch.bfloat16
