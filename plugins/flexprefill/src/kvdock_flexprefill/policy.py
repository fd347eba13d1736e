"""FlexPrefill as an attention policy: select blocks, then attend over them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdock.kernels.sparse import SparseBackend, choose_sparse_backend
from kvdock.policy import AttentionParams, AttentionPolicy, ModelFacts
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.selection import select


class FlexPrefillPolicy(AttentionPolicy):
    """Attend to the blocks that algorithms 1 to 4 of the paper select for each head."""

    def __init__(self, options: FlexPrefillOptions) -> None:
        self.options = options
        self._requested: str | None = None
        self._backends: dict[tuple[torch.device, torch.dtype, int], SparseBackend] = {}

    def bind(self, facts: ModelFacts, backend: str | None) -> None:
        """Find the kernel for this model now, so that one that cannot serve is refused early."""
        self._requested, self._backends = backend, {}
        if facts.device is not None and facts.dtype is not None and facts.head_dim is not None:
            self._backend(facts.device, facts.dtype, facts.head_dim)

    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        *,
        layer: int,
    ) -> Tensor | None:
        """Attend over selected blocks; None where dense attention is faster, or alone right."""
        if not params.plain or self.options.attends_densely(query.shape[2], key.shape[2]):
            return None
        backend = self._backend(query.device, query.dtype, query.shape[-1])
        lists = select(query, key, params, self.options)
        return backend.attend(query, key, value, lists, params)

    def _backend(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> SparseBackend:
        """Return the kernel for one device of the model; layers may live on several."""
        place = (device, dtype, head_dim)
        if place not in self._backends:
            self._backends[place] = choose_sparse_backend(
                self._requested, device, dtype, head_dim, self.options.block
            )
        return self._backends[place]
