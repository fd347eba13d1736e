"""H2O: keep the tokens with the largest accumulated attention and the most recent ones."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Needs, Paper

SPEC_VERSION = 1


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return H2O's record."""
    return [
        Method(
            id="h2o",
            name="H2O",
            kind="eviction",
            summary="keeps the heavy hitters and the most recent tokens, at every step",
            factory="kvdock_h2o.policy:H2OPolicy",
            options="kvdock_h2o.options:H2OOptions",
            paper=Paper(
                title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large"
                " Language Models",
                venue="NeurIPS 2023",
                url="https://arxiv.org/abs/2306.14048",
            ),
            capabilities=Capabilities(
                phases=frozenset({"prefill", "decode"}),
                needs_queries=True,
                needs_probabilities=True,
                shortest_gain=2048,
            ),
            needs=Needs(extras=("triton",)),
            default_budget=2048,
        )
    ]
