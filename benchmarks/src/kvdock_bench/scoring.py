"""RULER's official scoring: substring matches after a little cleaning."""

import re
from collections.abc import Sequence

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


def score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """Score one prediction from 0 to 1 with the named metric."""
    if metric not in METRICS:
        raise BenchError(f"Unknown metric {metric!r}.{did_you_mean(metric, METRICS)}")
    if isinstance(references, str) or not references:
        raise BenchError(f"A sample needs a list of at least one reference, got {references!r}.")
    return METRICS[metric](prediction, references)
