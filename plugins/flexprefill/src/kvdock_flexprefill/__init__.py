"""FlexPrefill: sparse prefill attention whose pattern and size follow each head and prompt."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Needs, Paper

SPEC_VERSION = 1


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return FlexPrefill's record."""
    return [
        Method(
            id="flexprefill",
            name="FlexPrefill",
            kind="sparse-prefill",
            summary="attends, head by head, to the key blocks that hold a share gamma of the mass",
            factory="kvdock_flexprefill.policy:FlexPrefillPolicy",
            options="kvdock_flexprefill.options:FlexPrefillOptions",
            paper=Paper(
                title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient"
                " Long-Sequence Inference",
                venue="ICLR 2025",
                url="https://arxiv.org/abs/2502.20766",
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
            lossless={"gamma": 1.0},
            contract={"block": 16, "min_budget": 16, "gamma": 0.6, "dense_below": 0},
        )
    ]
