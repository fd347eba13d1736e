"""SnapKV: keep the prompt tokens that the last queries of the prompt attend to."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return SnapKV's record."""
    return [
        Method(
            id="snapkv",
            name="SnapKV",
            kind="eviction",
            summary="keeps what the prompt's last queries attend to",
            factory="kvdock_snapkv.policy:SnapKVPolicy",
            options="kvdock_snapkv.options:SnapKVOptions",
            paper=Paper(
                title="SnapKV: LLM Knows What You are Looking for Before Generation",
                venue="NeurIPS 2024",
                url="https://arxiv.org/abs/2404.14469",
            ),
            capabilities=Capabilities(needs_queries=True, shortest_gain=2048),
            default_budget=2048,
        )
    ]
