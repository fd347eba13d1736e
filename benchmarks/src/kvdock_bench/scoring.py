"""RULER's official scoring: substring matches after a little cleaning."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvdock_bench.errors import BenchError, did_you_mean

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """Strip the prediction and turn control characters into line ends, as RULER does."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def _hits(prediction: str, references: Sequence[str]) -> list[bool]:
    text = postprocess(prediction).lower()
    return [reference.lower() in text for reference in references]


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of references that occur in the prediction."""
    return sum(_hits(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1 when any reference occurs in the prediction, else 0."""
    return float(any(_hits(prediction, references)))


METRICS = {"string_match_all": string_match_all, "string_match_part": string_match_part}


def check_metric(name: str) -> str:
    """Return the name of a metric, or raise a BenchError that lists all of them."""
    if name not in METRICS:
        raise BenchError(f"Unknown metric {name!r}.{did_you_mean(name, METRICS)}")
    return name


def score(
    metric: str,
    prediction: str,
    references: Sequence[str],
    meta: Mapping[str, Any] | None = None,
) -> float:
    """Score one prediction from 0 to 1 with the named metric.

    Args:
        meta: what the task says about the sample; its `metric` replaces the task's.
    """
    metric = check_metric((meta or {}).get("metric", metric))
    if isinstance(references, str) or not references:
        raise BenchError(f"A sample needs a list of at least one reference, got {references!r}.")
    return METRICS[metric](prediction, references)
