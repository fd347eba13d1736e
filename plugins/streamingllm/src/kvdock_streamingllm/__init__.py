"""StreamingLLM: keep the first tokens and the most recent ones, at every step."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return StreamingLLM's record."""
    return [
        Method(
            id="streamingllm",
            name="StreamingLLM",
            kind="eviction",
            summary="keeps the attention sinks and the most recent tokens",
            factory="kvdock_streamingllm.policy:StreamingLLMPolicy",
            options="kvdock_streamingllm.options:StreamingLLMOptions",
            paper=Paper(
                title="Efficient Streaming Language Models with Attention Sinks",
                venue="ICLR 2024",
                url="https://arxiv.org/abs/2309.17453",
            ),
            capabilities=Capabilities(phases=frozenset({"prefill", "decode"}), shortest_gain=2048),
            default_budget=2048,
        )
    ]
