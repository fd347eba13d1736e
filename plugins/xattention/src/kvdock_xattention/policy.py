"""XAttention as an attention policy: choose blocks, then attend to them."""

from dataclasses import replace

import torch
from torch import Tensor

from kvdock.errors import UnsupportedError
from kvdock.kernels.sparse import SparseBackend, choose_sparse_backend
from kvdock.policy import AttentionParams, AttentionPolicy, ModelFacts
from kvdock_xattention.options import XAttentionOptions
from kvdock_xattention.select import select


class XAttentionPolicy(AttentionPolicy):
    """Attend to the fewest blocks whose estimated attention reaches the threshold.

    The estimate is a softmax over sums of antidiagonals of S×S tiles (section 2 of the paper).
    """

    def __init__(self, options: XAttentionOptions) -> None:
        self.options = options
        self.chosen = options
        """The options for the heads that this process holds."""
        self._requested: str | None = None
        self._backends: dict[tuple[torch.device, torch.dtype, int], SparseBackend] = {}

    def bind(self, facts: ModelFacts, backend: str | None) -> None:
        """Check the table of thresholds and find the kernel now, so that errors come early."""
        heads = getattr(facts.config, "num_attention_heads", None)
        given = len(self.options.thresholds)
        if given > 1 and heads is not None and given != heads:
            raise UnsupportedError(
                f"xattention: threshold has {given} values, but the model has {heads} query heads."
                f" Give one number, or {heads}."
            )
        if given > 1:
            mine = facts.shard.place(given // facts.shard.size)
            self.chosen = replace(self.options, threshold=self.options.thresholds[mine])
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
        """Attend to the chosen blocks; None where dense attention is faster, or alone right.

        A few queries fill too little of their tiles for an estimate, and cost little.
        """
        few = query.shape[2] < self.options.block or key.shape[2] < self.options.dense_below
        if few or self.options.dense or not params.plain:
            return None
        backend = self._backend(query.device, query.dtype, query.shape[-1])
        lists = select(query, key, params, self.chosen)
        return backend.attend(query, key, value, lists, params)

    def _backend(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> SparseBackend:
        """Return the kernel for one device of the model; layers may live on several."""
        place = (device, dtype, head_dim)
        if place not in self._backends:
            self._backends[place] = choose_sparse_backend(
                self._requested, device, dtype, head_dim, self.options.block
            )
        return self._backends[place]
