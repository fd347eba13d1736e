"""XAttention: prefill attention over the key blocks whose antidiagonals score highest."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Needs, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return XAttention's record."""
    return [
        Method(
            id="xattention",
            name="XAttention",
            kind="sparse-prefill",
            summary="attends to the key blocks whose antidiagonals score highest",
            factory="kvdock_xattention.policy:XAttentionPolicy",
            options="kvdock_xattention.options:XAttentionOptions",
            paper=Paper(
                title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
                venue="ICML 2025",
                url="https://arxiv.org/abs/2503.16428",
            ),
            capabilities=Capabilities(
                needs_queries=True,
                evicts=False,
                backends=("flash-attn-4", "triton", "flex", "flashinfer", "reference"),
                shortest_gain=16_384,
                exact_chunks=False,
            ),
            needs=Needs(extras=("triton",)),
            default_budget=None,
            lossless={"threshold": 1.0},
            contract={"block": 16, "stride": 4, "threshold": 0.6, "dense_below": 0},
        )
    ]
