"""Scores agree with cases worked out by hand from RULER's definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdock_bench.errors import BenchError
from kvdock_bench.scoring import postprocess, score

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden_scores.jsonl").read_text("utf-8").splitlines()
]
TEXTS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6)


def test_there_are_enough_golden_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("metric", "prediction", "references", "expected"), CASES)
def test_golden(metric: str, prediction: str, references: list[str], expected: float):
    assert score(metric, prediction, references) == expected


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" a ", "a"),
        ("\x00a\x1f", "a"),
        ("a\tb\r\nc", "a\nb\n\nc"),
        ("\u00a0a\u3000", "a"),
        ("", ""),
    ],
)
def test_postprocess(raw: str, clean: str):
    assert postprocess(raw) == clean


@given(st.text(max_size=60), TEXTS)
def test_all_never_exceeds_part_and_both_stay_in_range(prediction: str, references: list[str]):
    share = score("string_match_all", prediction, references)
    found = score("string_match_part", prediction, references)
    assert 0 <= share <= found <= 1
    assert (share > 0) == (found == 1)


def test_wrong_use_is_refused():
    with pytest.raises(BenchError, match="Did you mean 'string_match_all'"):
        score("string_mach_all", "a", ["a"])
    for references in ([], "abc"):
        with pytest.raises(BenchError, match="list of at least one"):
            score("string_match_all", "a", references)
