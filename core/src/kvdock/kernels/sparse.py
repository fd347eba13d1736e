"""Block-sparse prefill backends, chosen here and nowhere else by trying the exact function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels import BACKENDS
from kvdock.kernels.blocks import BLOCK, BlockGrid, BlockLists, check_lists
from kvdock.policy import AttentionParams


class SparseBackend(Protocol):
    """Compute causal attention over listed blocks of keys."""

    name: str

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lists: BlockLists,
        params: AttentionParams,
    ) -> Tensor:
        """Map [b, H, Q, D], [b, K, N, D], [b, K, N, D] to [b, Q, H, D], contiguous.

        Inside the listed blocks a query sees the keys up to its own position; a row without any
        block gives zeros. No argument needs to be contiguous.
        """


Loader = Callable[[torch.device, torch.dtype, int, int], SparseBackend]
"""Maps device, dtype, head_dim and block to a backend; raises where that cannot be served."""


def _reference(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> SparseBackend:
    from kvdock.kernels.sparse_reference import ReferenceSparse

    return ReferenceSparse()


def _triton(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> SparseBackend:
    from kvdock.kernels.sparse_triton import load_triton

    return load_triton(device, dtype, head_dim, block)


def _flash(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> SparseBackend:
    from kvdock.kernels.sparse_flash import load_flash_sparse

    return load_flash_sparse(device, dtype, head_dim, block)


def _flex(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> SparseBackend:
    from kvdock.kernels.sparse_flex import load_flex

    return load_flex(device, dtype, head_dim, block)


def _flashinfer(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> SparseBackend:
    from kvdock.kernels.sparse_flashinfer import load_flashinfer

    return load_flashinfer(device, dtype, head_dim, block)


SPARSE_BACKENDS: dict[str, Loader] = {
    "flash-attn-4": _flash,
    "triton": _triton,
    "flex": _flex,
    "flashinfer": _flashinfer,
    "reference": _reference,
}

FASTEST_FIRST = ("flash-attn-4", "triton", "flex", "reference")
"""What a choice left open takes: the first that is usable."""


def choose_sparse_backend(
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block: int = BLOCK,
) -> SparseBackend:
    """Return the backend asked for, or the fastest usable one for None and "auto".

    A backend that was asked for and cannot serve this device, dtype, head_dim or block is an error;
    nothing else takes its place.
    """
    if requested is None or requested == "auto":
        return _fastest(device, dtype, head_dim, block)
    if requested not in SPARSE_BACKENDS:
        raise UnsupportedError(
            f"unknown sparse attention backend {requested!r}; choose one of"
            f" {', '.join(SPARSE_BACKENDS)}, or 'auto'."
        )
    try:
        return SPARSE_BACKENDS[requested](device, dtype, head_dim, block)
    except Exception as error:  # a broken kernel library raises anything at import
        raise UnsupportedError(
            f"sparse attention backend {requested!r} is not usable here: {error}. Choose"
            " backend='auto', or install what is missing; `kvdock doctor` shows what is usable and"
            " why not."
        ) from error


def probe_sparse_backends() -> list[tuple[str, bool, str]]:
    """Return (name, usable here, reason if not) for every sparse backend."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = []
    for name, load in SPARSE_BACKENDS.items():
        try:
            load(device, dtype, 128, BLOCK)
            rows.append((name, True, ""))
        except Exception as error:  # as above
            rows.append((name, False, f"{type(error).__name__}: {error}"))
    return rows


def dense_beside(requested: str | None) -> str | None:
    """Return the dense backend beside a sparse one: that of the same name, or the default."""
    known = {*SPARSE_BACKENDS, *BACKENDS, "auto"}
    if requested is not None and requested not in known:
        raise UnsupportedError(
            f"unknown attention backend {requested!r}; choose one of {', '.join(sorted(known))}."
        )
    return requested if requested in BACKENDS or requested == "auto" else None


def check_call(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, params: AttentionParams
) -> BlockGrid:
    """Refuse what no sparse backend computes; return the grid of the blocks."""
    if not params.plain:
        raise UnsupportedError(
            "block-sparse attention computes softmax(q·k·scaling) only; this model caps its scores"
            " or has learned sinks. Return None from AttentionPolicy.prefill to attend densely."
        )
    if key.shape != value.shape or query.shape[1] % key.shape[1]:
        raise UnsupportedError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do"
            " not fit: key and value must be alike, and their heads divide the query's."
        )
    return check_lists(lists, query, key)


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> SparseBackend:
    for name in FASTEST_FIRST:
        try:
            return SPARSE_BACKENDS[name](device, dtype, head_dim, block)
        except Exception:  # not installed, not for this device, or broken: take the next one
            continue
    raise UnsupportedError("no sparse attention backend is usable; see `kvdock doctor`.")
