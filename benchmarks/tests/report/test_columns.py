from dataclasses import replace

import pytest

from kvdock_bench.columns import make_board, make_boards
from kvdock_bench.errors import BenchError
from kvdock_bench.methods import FULL_CACHE, MethodConfig
from kvdock_bench.mixing import check_protocols
from kvdock_bench.runs import load_run
from kvdock_bench.summary import summarise

SNAPKV = MethodConfig("SnapKV", ("snapkv",), "128", {"snapkv": {"kernel": 7}})


def board(make, *made):
    return make_board([load_run(make(m, f"run{n}")) for n, m in enumerate(made)])


def labels(found):
    return [column.label for column in found.columns]


def test_one_run_is_a_table_of_its_methods(make, making):
    found = board(make, making)
    assert labels(found) == ["Full cache", "SnapKV", "KIVI"]
    assert [column.base for column in found.columns] == [None, "full", "full"]
    assert found.lengths == (512, 1024)


def test_runs_of_other_methods_stand_beside_each_other(make, making):
    full, snapkv, kivi = making.methods
    found = board(make, replace(making, methods=(full, snapkv)), replace(making, methods=(kivi,)))
    assert labels(found) == ["Full cache", "SnapKV", "KIVI"]
    # the full cache of the other run is its base, because the model is the same
    assert [column.base for column in found.columns] == [None, "full", "full"]
    assert summarise(found).paired[kivi.method_id, None, "all"].n == 32


def test_runs_of_other_cells_become_one_column(make, making):
    found = board(make, replace(making, lengths=(512,)), replace(making, lengths=(2048,)))
    assert labels(found) == ["Full cache", "SnapKV", "KIVI"]
    assert found.lengths == (512, 2048)
    assert summarise(found).averages["full", "all"].n == 32


def test_the_same_cells_twice_are_two_columns(make, making):
    full = replace(making, methods=(FULL_CACHE, SNAPKV))
    found = board(make, full, replace(full, seed=1))
    assert labels(found) == [
        *("Full cache run0", "Full cache run1", "SnapKV run0", "SnapKV run1"),
    ]
    bases = [column.base for column in found.columns]
    assert bases == [None, None, "full@run0", "full@run1"]


def test_another_budget_tells_namesakes_apart(make, making):
    small = replace(making, methods=(FULL_CACHE, SNAPKV))
    other = replace(making, methods=(replace(SNAPKV, budget="64"),))
    assert labels(board(make, small, other)) == ["Full cache", "SnapKV 128", "SnapKV 64"]


def test_another_model_is_named_and_not_compared(make, making):
    other = replace(making, model="model-2", methods=(SNAPKV,))
    found = board(make, replace(making, methods=(FULL_CACHE,)), other)
    assert labels(found) == ["Full cache, model-1 float32", "SnapKV, model-2 float32"]
    assert found.columns[1].base is None
    assert summarise(found).paired[SNAPKV.method_id, None, "all"] is None


def test_each_benchmark_gets_its_own_table(make, making):
    runs = [make(making, "a"), make(replace(making, benchmark="NIAH"), "b")]
    assert [b.benchmark for b in make_boards([load_run(r) for r in runs])] == ["RULER", "NIAH"]


def test_mixed_protocols_are_refused_and_named(make, making):
    other = replace(making, protocol=(("template", "raw"), ("stop_ids", [2, 5])))
    mixed = board(make, making, other)
    with pytest.raises(BenchError) as caught:
        check_protocols(mixed, allow_mixed=False)
    for text in ("template: chat:1 (run0), raw (run1)", "2, 5 (run1)", "--allow-mixed"):
        assert text in str(caught.value)
    assert "Mixed protocols" in check_protocols(mixed, allow_mixed=True)
    assert check_protocols(make_board([mixed.runs[0]]), allow_mixed=False) == ""


def test_tasks_may_differ_from_each_other(make, making):
    raw = replace(making, tasks=("vt",), protocol=(("template", "raw"),))
    found = board(make, replace(making, tasks=("niah_single_1",)), raw)
    assert check_protocols(found, allow_mixed=False) == ""


def test_what_an_old_record_does_not_tell_is_no_match(make, making):
    folder = make(making, "old")
    for path in (folder / "pred").glob("*/*.jsonl"):
        text = path.read_text().replace('"protocol_id":"id"', '"protocol_id":""')
        start, end = text.index('"protocol":{'), text.index('"protocol_id"')
        path.write_text(text.replace(text[start:end], '"protocol":{},'))
    old, new = load_run(folder), load_run(make(making, "new"))
    assert check_protocols(make_board([old]), allow_mixed=False) == ""
    with pytest.raises(BenchError, match=r"stop_ids: not recorded \(old\), 2 \(new\)"):
        check_protocols(make_board([old, new]), allow_mixed=False)
