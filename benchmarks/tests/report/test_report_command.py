"""`kvdock report` as a user calls it."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from kvdock_bench.commands import kvdock_commands
from kvdock_bench.errors import BenchError
from kvdock_bench.methods import FULL_CACHE, MethodConfig

SNAPKV = MethodConfig("SnapKV", ("snapkv",), "128", {"snapkv": {"kernel": 7}})
NASTY = "<script>alert('x')</script> & </td> {{ 7 * 7 }} \"'>"


@pytest.fixture
def report(tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)
    kvdock_commands(app)
    wide = {"COLUMNS": "300", "TERM": "dumb"}

    def call(*words):
        words = ["report", *map(str, words), "--output_dir", str(tmp_path)]
        return CliRunner().invoke(app, words, env=wide)

    return call


def test_one_run_by_its_tag(report, make, making):
    folder = make(making, "mine")
    result = report("mine")
    assert result.exit_code == 0, result.output
    assert "SnapKV" in result.output
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert len(rows) == 3 * 2 * 2
    assert {row["within_noise"] for row in rows if row["key"] == "full"} == {""}
    assert {row["within_noise"] for row in rows if row["key"] != "full"} <= {"yes", "no"}
    means = list(csv.DictReader((folder / "means.csv").read_text().splitlines()))
    assert [row["length"] for row in means[:3]] == ["512", "1024", "all"]
    assert float(means[0]["kv_bytes"]) == 512 * 46080
    assert (folder / "depths.csv").read_text().startswith("benchmark,run,key,method,budget,depth")
    assert list(json.loads((folder / "summary.json").read_text())["runs"]) == ["mine"]


def test_several_runs_get_a_folder_of_their_own(report, make, making, tmp_path):
    make(replace(making, methods=(FULL_CACHE,)), "a")
    make(replace(making, methods=(SNAPKV,), benchmark="RULER"), "b")
    result = report("a", "b")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "report_a_b"
    assert "| Length | Full cache | SnapKV |" in (folder / "table.md").read_text()
    assert not (tmp_path / "a" / "report.html").exists()
    assert report("a", "b", "--to", tmp_path / "other").exit_code == 0
    assert (tmp_path / "other" / "report.html").exists()


def test_two_benchmarks_share_a_page(report, make, making, tmp_path):
    make(making, "a")
    make(replace(making, benchmark="Mine"), "b")
    assert report("a", "b").exit_code == 0
    page = (tmp_path / "report_a_b" / "report.html").read_text()
    assert all(f'<h2 class="chapter">{name}</h2>' in page for name in ("RULER", "Mine"))
    names = {path.name for path in (tmp_path / "report_a_b" / "plots").iterdir()}
    assert {"RULER-accuracy.svg", "Mine-accuracy.svg"} <= names


def test_mixed_protocols_need_a_flag(report, make, making, tmp_path):
    make(making, "a")
    make(replace(making, protocol=(("template", "raw"),)), "b")
    error = report("a", "b").exception
    assert isinstance(error, BenchError) and "template: chat:1 (a), raw (b)" in str(error)
    assert not (tmp_path / "report_a_b").exists()
    assert report("a", "b", "--allow-mixed").exit_code == 0
    page = (tmp_path / "report_a_b" / "report.html").read_text()
    assert '<p class="warning">Mixed protocols' in page


@pytest.mark.parametrize("place", ["prediction", "label", "task", "tag"])
def test_everything_is_escaped(report, make, making, tmp_path, place):
    label = NASTY if place == "label" else "SnapKV"
    made = replace(
        making,
        methods=(FULL_CACHE, replace(SNAPKV, label=label)),
        prediction=NASTY if place == "prediction" else "x",
    )
    folder = make(made, "a")
    if place == "task":
        info = json.loads((folder / "run.json").read_text())
        info["model"]["name"] = info["status"] = info["hardware"]["device"] = NASTY
        (folder / "run.json").write_text(json.dumps(info))
    other = make(made, "b<script>" if place == "tag" else "b")
    assert report(folder, other, "--to", tmp_path / "out").exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&amp; &lt;/td&gt; {{ 7 * 7 }}" in page or place == "tag"
    assert "<script" not in (tmp_path / "out" / "table.md").read_text()
    for drawing in (tmp_path / "out" / "plots").glob("*.svg"):
        assert "<script" not in drawing.read_text()


def test_a_diff_tells_by_its_exit_code(report, make, making, tmp_path):
    made = replace(making, methods=(FULL_CACHE, SNAPKV), samples=20)
    make(replace(made, skill=((SNAPKV.method_id, 1.0),)), "a")
    make(replace(made, skill=((SNAPKV.method_id, 0.0),)), "b")
    result = report("--diff", "a", "b", "--to", tmp_path / "d")
    assert result.exit_code == 1
    assert "worse" in result.output
    assert report("--diff", "a", "a/../b").exit_code == 1
    assert report("--diff", "b", "a").exit_code == 0
    rows = list(csv.DictReader((tmp_path / "d" / "diff.csv").read_text().splitlines()))
    assert [row["verdict"] for row in rows if row["level"] == "average"] == ["same scores", "worse"]
    assert "## Regressions" in (tmp_path / "d" / "diff.md").read_text()
    assert "b against a" in (tmp_path / "d" / "diff.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name a run"),
        (["a", "--diff", "a", "b"], "a is one too many"),
        (["a", "nosuch"], "No run 'nosuch'"),
        (["a", "a"], "named twice"),
        (["a", "--to", "{}/b"], "holds another run"),
        (["a", "b", "--to", "{}/b"], "cannot take the report of several"),
    ],
)
def test_bad_input_is_named(report, make, making, tmp_path, words, message):
    make(making, "a")
    make(making, "b")
    error = report(*(word.format(tmp_path) for word in words)).exception
    assert isinstance(error, BenchError) and message in str(error)


def test_runs_of_the_same_name_are_told_apart(report, make, making, tmp_path):
    first, second = make(making, "x/run"), make(making, "y/run")
    assert report(first, second, "--to", tmp_path / "out").exit_code == 0
    runs = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert list(runs) == ["x/run", "y/run"]


def test_a_failed_write_leaves_the_old_report(report, make, making, monkeypatch):
    folder = make(making, "a")
    assert report("a").exit_code == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No")))
    assert isinstance(report("a").exception, BenchError)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.slow
def test_forty_thousand_answers_take_under_a_minute(make, large, tmp_path):
    import time

    folder = make(large)
    start = time.monotonic()
    command = [sys.executable, "-m", "kvdock", "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    assert (folder / "report.html").stat().st_size < 5e6
    lines = (folder / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + 13 * 5 * 13
    assert sum(",oom," in line for line in lines) == 1
