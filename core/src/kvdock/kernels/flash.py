"""Dense attention through flash-attn 2.x and flash-attn-4, where they are installed and run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvdock.kernels import Rows
from kvdock.policy import AttentionParams


class FlashBackend:
    """Call flash attention of layout [b, T, heads, D]; GQA and bottom-right causality are native.

    Args:
        dense: the library's ``flash_attn_func``.
        varlen: its ``flash_attn_varlen_func``, which takes rows of unequal length end to end.
        lse_switch: the argument that makes ``dense`` return (output, log-sum-exps, ...).
    """

    def __init__(
        self, name: str, dense: Callable[..., Any], varlen: Callable[..., Any], lse_switch: str
    ) -> None:
        self.name = name
        self._dense = dense
        self._varlen = varlen
        self._lse_switch = {lse_switch: True}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Attend causally, the last query aligned with the last key; shapes as in ``reference``."""
        states = (states.transpose(1, 2) for states in (query, key, value))
        output = self._dense(*states, softmax_scale=params.scaling, causal=True)
        return _output(output).contiguous()

    def attend_lse(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `attend` does and return what the kernel knows anyway, [b, H, Q]."""
        states = (states.transpose(1, 2) for states in (query, key, value))
        output, lse, *_ = self._dense(
            *states, softmax_scale=params.scaling, causal=True, **self._lse_switch
        )
        return output.contiguous(), lse

    def ragged(self, rows: Rows, params: AttentionParams) -> list[Tensor]:
        """Attend for all rows of a padded batch at once; each [1, heads, n, D] → [1, n, H, D]."""
        packed = [torch.cat([row[i][0].transpose(0, 1) for row in rows]) for i in range(3)]
        queries = [row[0].shape[2] for row in rows]
        keys = [row[1].shape[2] for row in rows]
        device = packed[0].device
        output = self._varlen(
            *packed,
            cu_seqlens_q=_cumulative(queries, device),
            cu_seqlens_k=_cumulative(keys, device),
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
            softmax_scale=params.scaling,
            causal=True,
        )
        return [states[None] for states in _output(output).split(queries)]


def load_flash_attn_2() -> FlashBackend:
    """Import flash-attn 2.x; raises ImportError when the exact functions are not there."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return FlashBackend(
        "flash-attn-2", flash_attn_func, flash_attn_varlen_func, "return_attn_probs"
    )


def load_flash_attn_4() -> FlashBackend:
    """Import flash-attn-4 (CuTe); raises ImportError when the exact functions are not there."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return FlashBackend("flash-attn-4", flash_attn_func, flash_attn_varlen_func, "return_lse")


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _output(output: Any) -> Tensor:
    """Return the attention output; flash-attn-4 returns it beside the log-sum-exp."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
