"""Numbers of a report: groups, statuses, noise, depths."""

import json
import math
from dataclasses import replace

import pytest

from kvdock_bench.accuracy_tables import main_table
from kvdock_bench.columns import make_board
from kvdock_bench.drawing import looks
from kvdock_bench.methods import FULL_CACHE, VLLM, MethodConfig
from kvdock_bench.page import make_chapter
from kvdock_bench.runs import load_run
from kvdock_bench.statistics import false_discovery, sign_flip_p
from kvdock_bench.summary import groups_of, summarise
from kvdock_bench.tables import NOISE
from kvdock_bench.tasks.registry import GROUPS

SNAPKV = MethodConfig("SnapKV", ("snapkv",), "128", {"snapkv": {"kernel": 7}})


@pytest.fixture
def summary(make):
    return lambda made: summarise(make_board([load_run(make(made))]))


@pytest.fixture
def two(making):
    return replace(making, methods=(FULL_CACHE, SNAPKV))


def test_the_headline_is_light_where_there_is_more(two, summary):
    made = replace(two, tasks=GROUPS["all"], lengths=(512,), samples=3)
    found = summary(replace(made, skill=(("full", 1.0), (SNAPKV.method_id, 0.0))))
    assert list(found.groups) == ["light", "all"]
    assert found.scores["full", 512, "light"].n == 18
    assert found.scores["full", 512, "all"].n == 39
    rows = {row[0]: row[1:] for row in main_table(found).rows}
    assert rows["512 (n=18)"] == ["100.00 ±0.0", "0.00 ±0.0"]
    assert rows["All 13 tasks"] == ["100.00 ±0.0", "0.00 ±0.0"]
    assert list(groups_of("RULER", GROUPS["light"])) == ["all"]
    assert list(groups_of("RULER", ("vt", "cwe"))) == ["all"]
    assert list(groups_of("my own", ("a", "b"))) == ["all"]


def test_a_difference_within_noise_says_so(two, summary):
    same = summary(replace(two, skill=(("full", 1.0), (SNAPKV.method_id, 1.0))))
    assert same.paired[SNAPKV.method_id, None, "all"].within_noise
    assert NOISE in main_table(same).rows[0][2]
    assert NOISE not in main_table(same).rows[0][1]


def test_a_clear_difference_is_not_marked(two, summary):
    found = summary(replace(two, skill=(("full", 1.0), (SNAPKV.method_id, 0.0))))
    assert found.paired[SNAPKV.method_id, None, "all"].difference == -100
    assert found.task_paired[SNAPKV.method_id, 512, "vt"].p == pytest.approx(2 / 2**8)
    assert not any(NOISE in cell for row in main_table(found).rows for cell in row)


def test_few_samples_prove_nothing(two, summary):
    made = replace(two, tasks=("vt",), lengths=(512,), samples=4)
    found = summary(replace(made, skill=(("full", 1.0), (SNAPKV.method_id, 0.0))))
    pair = found.paired[SNAPKV.method_id, None, "all"]
    # resampling four equal losses finds nothing else
    assert (pair.low, pair.high) == (-100, -100)
    assert pair.p == pytest.approx(1 / 8)
    assert pair.within_noise


def test_out_of_memory_failure_and_absence_are_told_apart(two, make):
    name = SNAPKV.method_id
    made = replace(
        two,
        tasks=("niah_single_1", "vt", "cwe"),
        errors=((name, 512, "vt", "oom"), (name, 1024, "cwe", "ValueError: x")),
        skip=((name, 1024, "vt"),),
    )
    chapter = make_chapter(summarise(make_board([load_run(make(made))])))
    rows = {row[0]: row[2] for table in chapter.tables for row in table.rows if len(row) > 2}
    table = {t.title: {row[0]: row[-1] for row in t.rows} for t in chapter.tables}
    cells = table["Accuracy by task"]
    assert (cells["512 vt"], cells["1K cwe"], cells["1K vt"]) == ("-", "error", "")
    assert rows["512 (n=24)"] == "-"
    assert rows["1K (n=24)"] == "error"


def test_a_mean_that_lacks_tasks_says_so_and_is_not_drawn(two, summary):
    name = SNAPKV.method_id
    made = replace(two, skip=((name, 512, "vt"), (name, 1024, "vt"), (name, 1024, "niah_single_1")))
    found = summary(made)
    assert found.scores[name, 512, "all"].lacking == 1
    assert found.scores[name, 512, "all"].comparable is None
    assert "1 task missing" in main_table(found).rows[0][2]
    assert main_table(found).rows[1][2] == ""
    assert found.averages[name, "all"].value is None


def test_depths_are_mapped_by_tenths(two, summary):
    found = summary(replace(two, samples=60, skill=(("full", 1.0), (SNAPKV.method_id, 0.0))))
    full, other = found.depths
    assert full.rows[0] == "0–10%" and len(full.rows) == 10
    assert full.lengths == (512, 1024)
    assert sum(cell[1] for row in full.cells for cell in row if cell) == 120
    assert {cell[0] for row in full.cells for cell in row if cell} == {100.0}
    assert {cell[0] for row in other.cells for cell in row if cell} == {0.0}


def test_a_grid_of_depths_keeps_its_depths(two, make):
    folder = make(replace(two, benchmark="NIAH", tasks=("needle", "needle_rouge"), samples=3))
    for path in (folder / "pred").glob("*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["meta"] = {"depth": line["index"] / 2}
            line["score"] = float("rouge" not in path.name)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summarise(make_board([load_run(folder)]))
    assert list(found.groups) == ["needle", "all"]
    assert found.depths[0].rows == ("0%", "50%", "100%")
    # the same prompts scored in another way are not mixed in
    assert found.depths[0].cells == [[(100.0, 1)] * 2] * 3


def test_likelihoods_become_a_perplexity(two, make):
    folder = make(replace(two, benchmark="perplexity", tasks=("perplexity", "next_token")))
    for path in (folder / "pred").glob("*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["meta"] = {"nll": 1.0 + (line["index"] % 2)}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chapter = make_chapter(summarise(make_board([load_run(folder)])))
    table = next(table for table in chapter.sides if table.title == "Perplexity")
    assert table.rows[0][:2] == ["512", f"{math.exp(1.5):.3f}"]


def test_a_server_is_compared_with_the_full_cache(two, summary):
    found = summary(replace(two, methods=(FULL_CACHE, VLLM)))
    assert found.board.column("vllm").base == "full"
    assert found.paired["vllm", None, "all"].n == 32
    styles = looks(found.board.columns)
    assert styles["vllm"]["color"] != styles["full"]["color"]


def test_prompts_of_their_own_length_have_no_axis(two, summary):
    found = make_chapter(summary(replace(two, benchmark="mine", lengths=(0,))))
    assert found.main.rows[0][0] == "own (n=16)"
    assert [plot.name for plot in found.plots] == ["pareto-0"]


def test_other_prompts_are_not_paired(two, make):
    folder = make(two)
    path = folder / "pred" / SNAPKV.method_id / "vt_512.jsonl"
    path.write_text(path.read_text().replace('"prompt_sha":"vt', '"prompt_sha":"x'))
    found = summarise(make_board([load_run(folder)]))
    assert found.task_paired[SNAPKV.method_id, 512, "vt"] is None
    assert found.paired[SNAPKV.method_id, 512, "all"].n == 8


def test_the_sign_flip_test_equals_enumeration():
    import itertools

    import numpy as np

    for terms in ([1, 1, 1, 1, 1, 1], [1, -1, 1, 1], [1, 0.5, 0.25, -0.3, 0.7, 0], [-3.0]):
        terms = np.array(terms, dtype=float)
        used = terms[terms != 0]
        sums = [abs(np.dot(signs, used)) for signs in itertools.product([1, -1], repeat=len(used))]
        expected = np.mean([found >= abs(used.sum()) - 1e-9 for found in sums])
        assert sign_flip_p(terms) == pytest.approx(expected)
    assert sign_flip_p(np.zeros(5)) == 1


def test_false_discovery():
    # after Benjamini and Hochberg (1995): p times m over its rank, made monotone from the top
    assert false_discovery([0.01, 0.5, 0.03, 0.04]) == pytest.approx([0.04, 0.5, 4 / 75, 4 / 75])
    assert false_discovery([]) == []
