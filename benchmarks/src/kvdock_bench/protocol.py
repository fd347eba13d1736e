"""How an answer was asked for: what two answers must share before they stand in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvdock import Budget
from kvdock_bench.fingerprint import short_hash

if TYPE_CHECKING:
    from kvdock_bench.methods import MethodConfig
    from kvdock_bench.schema import BenchConfig

Protocol = dict[str, Any]


def stop_ids(model: Any) -> list[int]:
    """Return the tokens that end the model's answers."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return sorted(set(ends)) if isinstance(ends, list) else [ends]


def make_protocol(
    config: BenchConfig, task: str, method: MethodConfig, *, template_id: str, stops: list[int]
) -> Protocol:
    """Return the protocol of one method's answers to one task.

    Its keys: `template` ("raw", or "chat:" and a hash), `answer_prefix` (its place), `truncation`
    ("none", "middle:TOKENS" or "middle-before-template:TOKENS"), `question` ("aware": part of the
    compressed prompt; "agnostic": asked after compression), `stop_ids`, `stop` (texts), `budget`
    (the kind, None without one).
    """
    cap = config.max_length
    cut = "middle-before-template" if config.suite.cut_first else "middle"
    budget = Budget.parse(method.budget)
    return {
        "template": "raw" if task in config.no_template_tasks else template_id,
        "answer_prefix": config.answer_prefix,
        "truncation": "none" if cap is None else f"{cut}:{cap}",
        "question": config.question,
        "stop_ids": stops,
        "stop": list(config.generation.stop),
        "budget": None if budget is None else budget.kind,
    }


def protocol_id(protocol: Protocol) -> str:
    """Return a short name, equal for answers that compare; "" for a record that has no protocol.

    The budget's kind is left out, because the full cache has none and stands beside every method.
    """
    asked = {name: value for name, value in protocol.items() if name != "budget"}
    return short_hash(asked, 8) if asked else ""
