"""PyramidKV: SnapKV's selection, with more room in low layers than in high ones."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return PyramidKV's record."""
    return [
        Method(
            id="pyramidkv",
            name="PyramidKV",
            kind="layer-budget",
            summary="keeps what the last queries attend to, more of it in low layers",
            factory="kvdock_pyramidkv.policy:PyramidKVPolicy",
            options="kvdock_pyramidkv.options:PyramidKVOptions",
            paper=Paper(
                title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information"
                " Funneling",
                venue="COLM 2025",
                url="https://arxiv.org/abs/2406.02069",
            ),
            capabilities=Capabilities(
                per_layer_lengths=True, needs_queries=True, shortest_gain=2048
            ),
            default_budget=2048,
        )
    ]
