from dataclasses import replace

import pytest

from kvdock_bench.diff import BETTER, BROKEN, MENDED, NOISE, SAME, WORSE, compare_runs
from kvdock_bench.diff_report import diff_warnings
from kvdock_bench.errors import BenchError
from kvdock_bench.methods import FULL_CACHE, MethodConfig
from kvdock_bench.runs import load_run

SNAPKV = MethodConfig("SnapKV", ("snapkv",), "128", {"snapkv": {"kernel": 7}})
NAME = SNAPKV.method_id


@pytest.fixture
def pair(make, making):
    """Compare a run of the full cache and SnapKV with one that differs in some ways."""
    before = replace(making, methods=(FULL_CACHE, SNAPKV), samples=20, skill=((NAME, 0.8),))

    def compare(old=(), **changes):
        first = replace(before, **dict(old))
        return compare_runs(
            load_run(make(first, "a")), load_run(make(replace(first, **changes), "b"))
        )

    return compare


def verdicts(found, label="SnapKV"):
    return {
        (change.level, change.length, change.what): change.verdict
        for change in found.changes
        if change.label == label
    }


def test_a_run_against_itself_has_the_same_scores(pair):
    found = pair()
    assert {change.verdict for change in found.changes} == {SAME}
    # per method: an average, a mean at each of two lengths, two tasks at each
    assert len(found.changes) == 2 * (1 + 2 + 4)
    assert found.regressions == found.improvements == []


def test_a_loss_is_a_regression_and_its_reverse_an_improvement(pair, make, making):
    found = pair(skill=((NAME, 0.1),))
    assert verdicts(found)["average", None, "all"] == WORSE
    assert all(change.label == "SnapKV" for change in found.regressions)
    losses = [change.paired.difference for change in found.regressions]
    assert losses == sorted(losses) and losses[-1] < 0
    back = compare_runs(found.after.board.runs[0], found.before.board.runs[0])
    assert verdicts(back)["average", None, "all"] == BETTER
    assert back.regressions == []


def test_chance_is_not_a_regression(pair):
    found = pair(seed=5)
    assert {change.verdict for change in found.changes} <= {NOISE, SAME}
    assert any(change.verdict == NOISE for change in found.changes)


def test_many_comparisons_are_adjusted_for(pair):
    found = pair(skill=((NAME, 0.6),))
    tested = [c for c in found.changes if c.level == "task" and c.paired is not None]
    assert all(c.p >= c.paired.p for c in tested)
    assert any(c.p > c.paired.p for c in tested)


def test_running_out_of_memory_is_a_regression(pair, make):
    found = pair(errors=((NAME, 1024, "vt", "oom"),))
    assert verdicts(found)["task", 1024, "vt"] == BROKEN
    assert verdicts(found)["average", None, "all"] == BROKEN
    assert verdicts(found)["task", 512, "vt"] == SAME
    back = compare_runs(found.after.board.runs[0], found.before.board.runs[0])
    assert verdicts(back)["task", 1024, "vt"] == MENDED
    assert back.regressions == []


def test_other_options_are_matched_and_named(pair):
    wide = replace(SNAPKV, options={"snapkv": {"kernel": 21}})
    found = pair(methods=(FULL_CACHE, wide), skill=((wide.method_id, 0.8),))
    assert verdicts(found)["average", None, "all"] == SAME
    assert any("'kernel': 7}} before" in text for text in diff_warnings(found))


def test_methods_of_one_run_only_are_named(pair):
    found = pair(methods=(FULL_CACHE,))
    assert found.unmatched == ["SnapKV (a)"]
    assert {change.label for change in found.changes} == {"Full cache"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "NIAH"}, "a is a run of RULER, b of NIAH"),
        ({"methods": (SNAPKV,), "old": {"methods": (FULL_CACHE,)}}, "no method in common"),
        ({"lengths": (2048,)}, "no answered prompt in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair, changes, message):
    with pytest.raises(BenchError, match=message):
        pair(**changes)
