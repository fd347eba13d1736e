"""XAttention's prefill: choose blocks, attend to them; dense attention where that is no gain.

Shapes: b rows, H query heads, K key/value heads, Q queries at the end of N keys, D head_dim.
"""

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
        self._backend: SparseBackend | None = None

    def bind(self, facts: ModelFacts, backend: str | None) -> None:
        """Check the table of thresholds and choose the kernel."""
        heads = getattr(facts.config, "num_attention_heads", None)
        given = len(self.options.thresholds)
        if given > 1 and heads is not None and given != heads:
            raise UnsupportedError(
                f"xattention: threshold has {given} values, but the model has {heads} query heads."
                f" Give one number, or {heads}."
            )
        if facts.device is not None and facts.dtype is not None and facts.head_dim is not None:
            self._backend = choose_sparse_backend(
                backend, facts.device, facts.dtype, facts.head_dim
            )

    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        *,
        layer: int,
    ) -> Tensor | None:
        """Return [b, Q, H, D], or None where dense attention is right."""
        if not params.plain or self.options.dense or key.shape[2] < self.options.dense_below:
            return None
        if self._backend is None:
            self._backend = choose_sparse_backend(
                None, query.device, query.dtype, query.shape[-1]
            )
        lists = select(query, key, params, self.options)
        return self._backend.attend(query, key, value, lists, params)
