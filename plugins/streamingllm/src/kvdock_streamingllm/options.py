"""StreamingLLM's options; importable without torch."""

from dataclasses import dataclass

from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class StreamingLLMOptions(Options):
    """The recent window takes what the budget leaves beside the sinks."""

    sinks: int = option(4, ge=0, help="first tokens that are never evicted")
    positions: str = option(
        "cache",
        choices=("cache", "original"),
        help="RoPE positions inside the cache (the paper) or of the text",
    )
