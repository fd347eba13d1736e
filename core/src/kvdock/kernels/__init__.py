"""Dense attention backends, chosen here and nowhere else by trying the exact function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.policy import AttentionParams

Rows = Sequence[tuple[Tensor, Tensor, Tensor]]


class DenseBackend(Protocol):
    """Compute causal attention of clean rows, the last query aligned with the last key."""

    name: str

    @property
    def ragged(self) -> Callable[[Rows, AttentionParams], list[Tensor]] | None:
        """Attend for all rows of a padded batch in one call; None where there is no such kernel."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Map [b, H, Q, D], [b, K, N, D], [b, K, N, D] to [b, Q, H, D], contiguous."""

    def attend_lse(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Attend alike; add the log-sum-exps, natural, float32 [b, H, Q], where they are free."""


def _reference(device: torch.device, dtype: torch.dtype) -> DenseBackend:
    from kvdock.kernels.reference import ReferenceBackend

    return ReferenceBackend()


def _sdpa(device: torch.device, dtype: torch.dtype) -> DenseBackend:
    from kvdock.kernels.sdpa import SDPABackend

    return SDPABackend()


def _flash_attn_2(device: torch.device, dtype: torch.dtype) -> DenseBackend:
    from kvdock.kernels.flash import load_flash_attn_2

    backend = load_flash_attn_2()
    _need_gpu(device, dtype, capability=(8, 0))
    return backend


def _flash_attn_4(device: torch.device, dtype: torch.dtype) -> DenseBackend:
    from kvdock.kernels.flash import load_flash_attn_4

    backend = load_flash_attn_4()
    _need_gpu(device, dtype, capability=(9, 0))
    return backend


BACKENDS: dict[str, Callable[[torch.device, torch.dtype], DenseBackend]] = {
    "sdpa": _sdpa,
    "flash-attn-4": _flash_attn_4,
    "flash-attn-2": _flash_attn_2,
    "reference": _reference,
}

FROM_TRANSFORMERS = {
    "sdpa": "sdpa",
    "eager": "reference",
    "flash_attention_2": "flash-attn-2",
    "flash_attention_4": "flash-attn-4",
}
"""The backend that computes what a transformers attention implementation computes."""

FASTEST_FIRST = ("flash-attn-4", "flash-attn-2", "sdpa")


def choose_backend(
    requested: str | None, previous: str, device: torch.device, dtype: torch.dtype
) -> DenseBackend:
    """Return the dense backend for prefill.

    Args:
        requested: a name of ``BACKENDS``, "auto" for the fastest usable one, or None for the one
            the model uses already (so that prefill stays bit-identical).
        previous: the model's transformers attention implementation.
    """
    if requested is None:
        name = FROM_TRANSFORMERS.get(previous, "sdpa")
        own = _load(name, device, dtype)
        return _sdpa(device, dtype) if own is None else own
    if requested == "auto":
        found = (_load(name, device, dtype) for name in FASTEST_FIRST)
        return next(backend for backend in found if backend is not None)
    if requested not in BACKENDS:
        raise UnsupportedError(
            f"unknown attention backend {requested!r}; choose one of {', '.join(BACKENDS)}, or"
            " 'auto'."
        )
    try:
        return BACKENDS[requested](device, dtype)
    except (ImportError, UnsupportedError) as error:
        raise UnsupportedError(
            f"attention backend {requested!r} is not usable here: {error}. Install it, or choose"
            " backend='auto'; `kvdock doctor` shows what is usable and why not."
        ) from error


def probe_backends() -> list[tuple[str, bool, str]]:
    """Return (name, usable here, reason if not) for every dense backend."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for name, load in BACKENDS.items():
        try:
            load(device, dtype)
            rows.append((name, True, ""))
        except Exception as error:  # a broken kernel library raises anything at import
            rows.append((name, False, f"{type(error).__name__}: {error}"))
    return rows


def _load(name: str, device: torch.device, dtype: torch.dtype) -> DenseBackend | None:
    try:
        return BACKENDS[name](device, dtype)
    except Exception:  # not installed, or broken: the caller takes the next one
        return None


def _need_gpu(device: torch.device, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    wanted = f"an NVIDIA GPU of compute capability {capability[0]}.{capability[1]} or newer"
    if device.type != "cuda":
        raise UnsupportedError(f"it needs {wanted}, the model is on {device.type!r}")
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        raise UnsupportedError(f"it needs {wanted}, found {found[0]}.{found[1]}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"it needs float16 or bfloat16, the model is {dtype}")
