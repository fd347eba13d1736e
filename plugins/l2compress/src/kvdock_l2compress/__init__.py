"""L2Compress: keep the keys of low norm, which later queries attend to most."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return L2Compress's record."""
    return [
        Method(
            id="l2compress",
            name="L2Compress",
            kind="eviction",
            summary="keeps the keys of low norm; the first layers stay whole",
            factory="kvdock_l2compress.policy:L2CompressPolicy",
            options="kvdock_l2compress.options:L2CompressOptions",
            paper=Paper(
                title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
                venue="EMNLP 2024",
                url="https://arxiv.org/abs/2406.11430",
            ),
            capabilities=Capabilities(per_layer_lengths=True, shortest_gain=2048),
            default_budget=2048,
        )
    ]
