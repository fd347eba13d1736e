"""CakeKV: share one budget between the layers by how widely and restlessly they attend."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper

SPEC_VERSION = 1


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return CakeKV's record."""
    return [
        Method(
            id="cakekv",
            name="CakeKV",
            kind="layer-budget",
            summary="gives more of the cache to layers whose attention is spread and shifting",
            factory="kvdock_cakekv.policy:CakeKVPolicy",
            options="kvdock_cakekv.options:CakeKVOptions",
            paper=Paper(
                title="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
                venue="ICLR 2025",
                url="https://arxiv.org/abs/2503.12491",
            ),
            capabilities=Capabilities(
                phases=frozenset({"prefill", "decode"}),
                per_layer_lengths=True,
                needs_queries=True,
                shortest_gain=2048,
            ),
            default_budget=2048,
        )
    ]
