"""All metrics by name; RULER's official ones are substring matches after a little cleaning."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvdock_bench import answer_metrics
from kvdock_bench.answer_metrics import best
from kvdock_bench.errors import BenchError, did_you_mean

Metric = Callable[[str, Sequence[str], Mapping[str, Any]], float]

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


def _token_probability(_: str, __: Sequence[str], meta: Mapping[str, Any]) -> float:
    """Return the geometric mean of the true tokens' probabilities: one over the perplexity."""
    return math.exp(-meta["nll"])


def _next_token(_: str, __: Sequence[str], meta: Mapping[str, Any]) -> float:
    """Return the share of true tokens that the model ranks first."""
    return float(meta["ranked_first"])


def _plain(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda prediction, references, _: metric(prediction, references)


METRICS: dict[str, Metric] = {
    "string_match_all": _plain(string_match_all),
    "string_match_part": _plain(string_match_part),
    "qa_f1": best(answer_metrics.qa_f1),
    "qa_f1_zh": best(answer_metrics.qa_f1_zh),
    "rouge_l": best(answer_metrics.rouge_l),
    "rouge_l_zh": best(answer_metrics.rouge_l_zh),
    "classification": best(answer_metrics.classification),
    "count": best(answer_metrics.count),
    "retrieval": best(answer_metrics.retrieval),
    "retrieval_zh": best(answer_metrics.retrieval_zh),
    "code_similarity": best(answer_metrics.code_similarity),
    "word_overlap": best(answer_metrics.word_overlap),
    "token_probability": _token_probability,
    "next_token": _next_token,
}


_OF_LIKELIHOODS = (_token_probability, _next_token)


def check_metric(name: str) -> str:
    """Return the name of a metric, or raise a BenchError that lists all of them."""
    if name not in METRICS:
        raise BenchError(f"Unknown metric {name!r}.{did_you_mean(name, METRICS)}")
    return name


def check_answer_metric(name: str) -> str:
    """Return the name of a metric that scores an answer's text, or raise a BenchError."""
    if name not in METRICS or METRICS[name] in _OF_LIKELIHOODS:
        known = [known for known, metric in METRICS.items() if metric not in _OF_LIKELIHOODS]
        raise BenchError(f"Unknown metric {name!r}.{did_you_mean(name, known)}")
    return name


def check_references(metric: str, references: Sequence[str]) -> None:
    """Raise a BenchError for references that the metric cannot compare an answer with."""
    if metric.startswith("retrieval"):
        METRICS[metric]("", references, {})


def score(
    metric: str,
    prediction: str,
    references: Sequence[str],
    meta: Mapping[str, Any] | None = None,
) -> float:
    """Score one prediction from 0 to 1 with the named metric.

    Args:
        meta: what the task says about the sample; its `metric` replaces the task's, `classes` are
            those of a classification, `first_line` cuts the prediction after one line, `nll` and
            `ranked_first` are what a text's tokens were found to be.
    """
    metric = check_metric((meta or {}).get("metric", metric))
    if isinstance(references, str) or not references:
        raise BenchError(f"A sample needs a list of at least one reference, got {references!r}.")
    return METRICS[metric](prediction, references, meta or {})
