"""The grid script: reading methods, planning jobs, merging answers, and one small run."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from kvdock.errors import KVDockError
from kvdock_bench.record import UNFIT, Record

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in ("grid_jobs", "grid_tables", "grid_worker", "ruler_grid"):
        sys.modules.pop(name, None)


def record(method, index, score, *, error=None, task="t", length=64):
    return Record(
        key=f"{method.method_id}{task}{length}{index}",
        method_id=method.method_id,
        method=method.label,
        task=task,
        length=length,
        index=index,
        seed=1,
        prompt_sha="",
        n_prompt_tokens=9,
        units=1,
        references=["x"],
        data_source="",
        device="cpu",
        batch_size=1,
        prediction="x",
        score=score,
        error=error,
    )


def test_options_and_budget(script):
    jobs = script("grid_jobs")
    method = jobs.variant("random:window=4,seed=7", "32")
    assert (method.label, method.budget) == ("random:window=4,seed=7", "32")
    assert method.options == {"random": {"window": 4, "seed": 7}}
    assert jobs.variant("random+random:random.seed=7", "32").ids == ("random", "random")
    assert jobs.variant("full", "32").is_full


@pytest.mark.parametrize("spec", ["full:a=1", "random:7", "random:b=1", "nowhere"])
def test_bad_specs(script, spec):
    with pytest.raises(KVDockError):
        script("grid_jobs").variant(spec, "32")


def test_a_comma_in_a_list(script):
    assert script("grid_jobs")._split("s", "a=0,1,b=2") == ["a=0,1", "b=2"]


def test_jobs_longest_first_and_full_once(script):
    jobs = script("grid_jobs")
    methods = jobs.variants(["random:seed=1", "random", "full", "random:window=0"], ["8", "16"])
    assert [(m.label, m.budget) for m in methods] == [
        ("random:seed=1", "8"),
        ("random:seed=1", "16"),
        ("random", "8"),
        ("random", "16"),
        ("full", None),
    ]
    planned = jobs.plan_jobs(methods, [64, 512])
    assert [job.length for job in planned] == [512] * 5 + [64] * 5
    assert [job.number for job in planned] == list(range(10))


def test_merged_means_and_pairs(script):
    jobs, tables = script("grid_jobs"), script("grid_tables")
    full, drawn, other = methods = [
        jobs.variant(s, "8") for s in ("full", "random", "random:seed=3")
    ]
    records = [record(full, i, 1.0) for i in range(4)] + [record(drawn, i, 0.0) for i in range(4)]
    # one answer is missing, one did not fit
    records += [record(other, 0, 1.0), record(other, 1, 0.0), record(other, 2, None, error=UNFIT)]
    grid = tables.Grid(records, lengths=[64], tasks=["t"], samples=4)
    rows = {row["method"]: row for row in tables.summarise(grid, methods)}
    assert rows["full"]["mean"] == 100
    assert rows["full"]["complete"]
    assert rows["random"]["vs_full"]["difference"] == -100
    assert not rows["random"]["vs_full"]["within_noise"]
    row = rows["random:seed=3"]
    assert (row["n"], row["mean"], row["complete"]) == (2, 50, False)
    assert (row["vs_random"]["difference"], row["vs_random"]["n"]) == (50, 2)
    assert row["vs_random"]["within_noise"]
    text = tables.to_markdown(list(rows.values()), [64])
    assert "| random:seed=3 | 50.0 ± 50.0* | 50.0 ± 50.0* | 2 | 0 | -50.0 [" in text


def test_no_machine_paths(script):
    clean = script("ruler_grid").without_paths
    assert clean("--out=/a/b/c.txt in '/x/y' 1/2 a/b") == "--out=c.txt in 'y' 1/2 a/b"


def test_deadline_leaves_jobs_and_writes_files(script, model_folder, config_file, tmp_path, capsys):
    arguments = ["--model_path", str(model_folder), "--group", str(config_file), "--device", "cpu"]
    arguments += ["--dtype", "float32", "--methods", "full", "--lengths", "640", "--samples", "2"]
    out = tmp_path / "out"
    code = script("ruler_grid").main([*arguments, "--deadline", "0", "--out", str(out)])
    run = json.loads((out / "run.json").read_text())
    assert code == 1
    assert run["unfinished"] == ["full length 640"]
    assert str(tmp_path) not in run["command"]
    assert "Unfinished: full length 640" in (out / "table.md").read_text()
    with gzip.open(out / "records.jsonl.gz") as file:
        assert file.read() == b""


def test_grid_runs_in_a_process(script, model_folder, config_file, tmp_path, capsys):
    arguments = ["--model_path", str(model_folder), "--group", str(config_file), "--device", "cpu"]
    arguments += ["--dtype", "float32", "--methods", "full", "random", "--budgets", "16"]
    arguments += ["--lengths", "640", "--samples", "2", "--batch-size", "2", "--workers", "1"]
    assert script("ruler_grid").main([*arguments, "--out", str(tmp_path)]) == 0
    with gzip.open(tmp_path / "records.jsonl.gz") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 2 * 2 * 2
    assert {(line["method"], line["budget"]) for line in lines} == {
        ("full", None),
        ("random", "16"),
    }
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][1]["vs_full"]["n"] == 4
