"""Recognise that memory ran out, on GPU or CPU, and give back what can be given back."""

from __future__ import annotations

import gc

import torch

_SIGNS = (
    "out of memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_oom(error: BaseException) -> bool:
    """Tell whether this error, or one it was raised from, means that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in _SIGNS):
            return True
        seen = seen.__cause__
    return False


def release() -> None:
    """Free what no one holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
