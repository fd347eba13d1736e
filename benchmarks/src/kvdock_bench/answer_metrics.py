"""Scores of short answers, summaries and code, as LongBench defines them; from 0 to 1.

Each function scores a prediction against one reference. Definitions: Bai et al., ACL 2024
(https://arxiv.org/abs/2308.14508) and its evaluation script, whose oddities are kept: numbers
compare with everything the script compares them with.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from kvdock_bench.errors import BenchError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBERS = re.compile(r"\d+")
# The script's list of Chinese punctuation as code points; some common marks are not in it.
_WIDE_PUNCTUATION = (
    *((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
    *((0x3001, 0x3003), (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F)),
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0xFE4F, 0xFE4F)),
)
_COMMENT_SIGNS = ("`", "#", "//")


def qa_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words both texts share, articles and punctuation left out."""
    return _f1(_english(prediction), _english(reference))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """Return the F1 of the Chinese words both texts share, cut by jieba."""
    return _f1(_chinese(prediction), _chinese(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """Return the F of ROUGE-L as the package `rouge` computes it; 0 where it cannot."""
    try:
        scores = _rouge().get_scores([prediction], [reference], avg=True)
    except (ValueError, RecursionError, ZeroDivisionError):
        # an empty text, or one too long for the package's recursion: the script counts both as 0
        return 0.0
    return float(scores["rouge-l"]["f"])


def rouge_l_zh(prediction: str, reference: str) -> float:
    """Return ROUGE-L over Chinese words, cut by jieba."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that the prediction names, if one is the reference.

    A named class that is part of the reference's name does not count. The script drops these while
    it walks over the list, so the one after a dropped one is never looked at; that is kept.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        name = named[place]
        if name in reference and name != reference:
            named.remove(name)
        place += 1
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Return the share of the prediction's numbers that equal the reference."""
    numbers = _NUMBERS.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Return the share of the prediction's numbers that equal the reference's "Paragraph N"."""
    return count(prediction, _number_after("Paragraph ", reference))


def retrieval_zh(prediction: str, reference: str) -> float:
    """Return the share of the prediction's numbers that equal the number after 段落."""
    return count(prediction, _number_after("段落", reference))


def code_similarity(prediction: str, reference: str) -> float:
    """Return how alike the first line of code and the reference are, in whole percent.

    The ratio is difflib's; the script's differs a little where python-Levenshtein is installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in _COMMENT_SIGNS)), "")
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def word_overlap(prediction: str, reference: str) -> float:
    """Return the share of the reference's distinct words that occur in the prediction."""
    wanted = set(_words(reference))
    return len(wanted & set(_words(prediction))) / len(wanted) if wanted else 0.0


def best(metric: Any) -> Any:
    """Return a metric over several references: the best of them."""

    def scored(prediction: str, references: Sequence[str], meta: Mapping[str, Any]) -> float:
        text = _first_line(prediction) if meta.get("first_line") else prediction
        more = (meta.get("classes", ()),) if metric is classification else ()
        return max(float(metric(text, reference, *more)) for reference in references)

    return scored


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def _words(text: str) -> list[str]:
    return [word.strip(string.punctuation) for word in text.lower().split()]


def _english(text: str) -> list[str]:
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _chinese(text: str) -> list[str]:
    words = ("".join(filter(_is_content, word.lower())) for word in _cut(text))
    return ["".join(word.split()) for word in words if word.strip()]


def _is_content(sign: str) -> bool:
    wide = any(first <= ord(sign) <= last for first, last in _WIDE_PUNCTUATION)
    return not wide and sign not in string.punctuation


def _number_after(word: str, reference: str) -> str:
    found = re.search(rf"{word}(\d+)", reference)
    if found is None:
        raise BenchError(f"The reference {reference!r:.60} names no paragraph ({word}N).")
    return found[1]


def _cut(text: str) -> Iterable[str]:
    try:
        import jieba
    except ImportError as error:
        raise _missing("jieba") from error
    jieba.setLogLevel(60)
    return list(jieba.cut(text, cut_all=False))


@cache
def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError as error:
        raise _missing("rouge") from error
    return Rouge(metrics=["rouge-l"], stats=["f"])


def _missing(package: str) -> BenchError:
    return BenchError(
        f"This metric needs the package {package}: pip install 'kvdock-bench[longbench]'"
    )
