"""Refuse prompts that a model cannot read: beyond its context answers mean nothing."""

from __future__ import annotations

from typing import Any

from kvdock_bench.errors import BenchError
from kvdock_bench.schema import BenchConfig


def context_of(config: Any) -> int | None:
    """Return the tokens a model's config allows, None where it says nothing."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_lengths(config: BenchConfig, context: int | None) -> None:
    """Raise BenchError when a length of the config exceeds the model's context."""
    if context is None:
        return
    for task in config.tasks:
        cap, answer = config.max_length, config.max_new_tokens(task)
        for length in config.length:
            needed = length if cap is None else min(length, cap + answer)
            if needed > context:
                raise BenchError(
                    f"length {length}: {task.name} would need {needed} tokens, the model's context "
                    f"has {context}. {_way_out(context - answer)}"
                )


def check_prompt(place: str, n_tokens: int, answer: int, context: int | None) -> None:
    """Raise BenchError when a prompt and its answer exceed the model's context."""
    if context is not None and n_tokens + answer > context:
        raise BenchError(
            f"{place}: the prompt has {n_tokens} tokens, and {answer} more for the answer exceed "
            f"the model's context of {context}. {_way_out(context - answer)}"
        )


def _way_out(most: int) -> str:
    return f"Choose shorter lengths, or cut the middle of long prompts with --max_length {most}."
