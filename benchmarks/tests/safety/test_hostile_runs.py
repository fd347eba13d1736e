"""Run folders of strangers: texts stay texts, numbers have an end, links are not followed."""

import copy
import csv
import io
import json
import re

import pytest
from rich.console import Console

from kvdock_bench.errors import BenchError
from kvdock_bench.escaping import drawn, markdown, spreadsheet, visible
from kvdock_bench.folder import file_names, open_run
from kvdock_bench.records import RecordStore
from kvdock_bench.report_command import diff, report
from kvdock_bench.results import show_table
from kvdock_bench.tables import Table

pytestmark = pytest.mark.versionless

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
NASTY = {
    "html": SCRIPT,
    "attribute": "\"'><svg onload=alert(1)>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "link": "[free](javascript:alert(1)) ![x](http://example.org/x) `code`",
    "border": "a\\|b|c\nd",
    "formula": "=cmd|'/C calc'!A0",
    "plus": "+1+1",
    "at": "@SUM(1)",
    "minus": "-2+3",
    "wide": "\uff1d1+1",
    "terminal": "\x1b]0;owned\x07\x1b[2J",
    "direction": "abc\u202etxt.exe",
    "nul": "a\0b",
    "half": "a\ud800b",
    "mathtext": "$\\frac{1}{$ $x",
    "hidden": "_label",
    "wider": "模型 🎉",
    "long": "x" * 300,
    "path": "../../../../tmp/evil",
}


def test_every_text_of_a_run_stays_a_text(stored, tmp_path, capsys):
    text, texts = NASTY["mathtext"] + SCRIPT, list(NASTY.values())
    content = stored.info(command=text, status=text)
    content["config"] |= {"task_names": texts, "benchmark_name": NASTY["path"], "length": [512]}
    (full, method), content["methods"] = content["methods"], []
    for number, label in enumerate(texts):
        content["methods"].append({**method, "label": label, "method_id": f"m{number}"})
    content["methods"] += [full, {**method, "method_id": "x", "label": "x", "budget": text}]
    content["model"]["name"] = content["model"]["attention"] = text
    content["hardware"]["device"] = text
    content["versions"] = {text: text}
    found = {}
    for number, task in enumerate(texts):
        told = {"prediction": task, "references": [task], "data_source": f"offline {task}"}
        told |= {"protocol": {"template": task, task: task}}
        for column in content["methods"]:
            record = stored.record(column["method_id"], task, **told)
            found[f"{column['method_id']}/{number}.jsonl"] = [record]
    stored.write(tmp_path / "runs" / "a", content, found)
    stored.write(tmp_path / "runs" / "c", content, found)
    other = copy.deepcopy(content)
    other["config"]["benchmark_name"] = text
    stored.write(tmp_path / "runs" / "b", other, {})
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    to = tmp_path / "out"
    assert report(["a", "b"], tmp_path / "runs", to=to) == 0
    assert diff("a", "c", tmp_path / "runs", to=tmp_path / "out" / "diff") == 0
    printed = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(to) for path in made)
    assert len(list((to / "plots").iterdir())) >= 4
    for path in made:
        _check_file(path)


def _check_file(path):
    written = path.read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", written) or path.suffix == ".json"
    if path.suffix in (".html", ".svg"):
        assert not re.search(r"<(script|img|svg onload)", written)
        assert "49" not in re.findall(r"<h1>(.*?)</h1>", written)
    if path.suffix == ".md":
        widths = [_cells(line) for line in written.splitlines() if line.startswith("|")]
        assert "<script" not in written and "](" not in written.replace("]\\(", "")
        assert widths and all(widths)
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(written)))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            assert not re.match(r"\s*[=+@\uff1d-]", cell) or _is_number(cell)
    if path.suffix == ".json":
        json.loads(written, parse_constant=pytest.fail)


def _cells(line):
    return len(re.findall(r"(?:\\.|[^|\\])+\|", line))


def _is_number(cell):
    return re.fullmatch(r"-?[0-9.]+", cell) is not None


def test_a_table_keeps_its_columns():
    table = Table(NASTY["link"], ["A", "B"], [[NASTY["border"], SCRIPT]], "a [b](c) note")
    text = table.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [_cells(line) for line in rows] == [2, 2, 2]
    assert "](" not in text.replace("]\\(", "") and "<" not in text


def test_the_terminal_sees_no_control_characters():
    out = io.StringIO()
    text = NASTY["terminal"] + NASTY["direction"] + NASTY["half"]
    show_table(Console(file=out, width=400), Table(text, [text, "B"], [[text, text]], text))
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800]", out.getvalue())
    assert r"\x1b]0;owned\x07" in out.getvalue() and r"abc\u202etxt.exe" in out.getvalue()


def test_what_is_plain_stays_as_it_is():
    for text in ("niah_single_1", "SnapKV 25%", "模型", "a.b-c_d", "x [y, z]", "naïve • £5 & 3"):
        assert visible(text) == markdown(text) == spreadsheet(text) == drawn(text) == text


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["RULER", "NIAH"], ["RULER", "NIAH"]),
        (["a/b", "a-b", "A:B"], ["a-b", "a-b-2", "A-B-3"]),
        (["../..", "\0", "."], ["unnamed", "unnamed-2", "unnamed-3"]),
        (["x" * 500, "x" * 501], ["x" * 120, "x" * 120 + "-2"]),
    ],
)
def test_benchmarks_give_plain_file_names(names, found):
    assert file_names(names) == found


def _set(content, path, value):
    *way, last = path
    for key in way:
        content = content[key]
    content[last] = value


WRONG_INFO = [
    (("config", "length"), [10**400]),
    (("config", "length"), ["512"]),
    (("config", "length"), []),
    (("config", "length"), [True]),
    (("config", "task_names"), "vt"),
    (("config", "task_names"), []),
    (("config", "num_samples"), 10**30),
    (("config", "num_samples"), -1),
    (("config", "answer_prefix"), None),
    (("config", "no_template_tasks"), 3),
    (("config", "generation"), []),
    (("counts",), {"vt": "2"}),
    (("methods",), {}),
    (("methods", 0, "methods"), "snapkv"),
    (("methods", 1, "options"), {"snapkv": 3}),
    (("methods", 0, "label"), 3),
    (("hardware",), {}),
    (("hardware", "device"), ["x"]),
    (("git",), "abc"),
    (("versions",), {"python": 3}),
    (("vllm",), {"versions": [1]}),
    (("status",), None),
    (("started",), 5),
    (("identity",), []),
    (("model", "dtype"), {}),
]


@pytest.mark.parametrize(("path", "value"), WRONG_INFO)
def test_a_run_json_of_wrong_kinds_is_named_and_leaves_the_report(stored, tmp_path, path, value):
    content = stored.info()
    _set(content, path, value)
    folder = stored.write(tmp_path / "a", content)
    (folder / "report.html").write_text("of yesterday")
    before = {place: place.read_bytes() for place in folder.rglob("*") if place.is_file()}
    with pytest.raises(BenchError, match=r"run\.json (does not describe a run|names no method)"):
        report(["a"], tmp_path)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


WRONG_RECORD = [
    ("score", "1"),
    ("score", 1e300),
    ("score", -1),
    ("score", True),
    ("length", 10**30),
    ("index", 1.5),
    ("n_prompt_tokens", 10**400),
    ("references", "4711"),
    ("references", [3]),
    ("prediction", 5),
    ("prediction", ["x"]),
    ("error", {}),
    ("timings", {"prefill_s": "x"}),
    ("timings", [1, 2, 3, 4, 5]),
    ("memory", {"peak_alloc_bytes": 1, "kv_bytes": 1, "kv_full_bytes": 1, "kv_ratio": 1e200}),
    ("meta", {"depths": 0.5}),
    ("meta", {"depths": ["x"]}),
    ("meta", {"depths": [7.5]}),
    ("meta", {"depth": "x"}),
    ("meta", {"nll": "x"}),
    ("meta", []),
    ("protocol", "chat"),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_RECORD)
def test_a_record_of_wrong_kinds_names_file_and_line(stored, tmp_path, name, value):
    folder = stored.write(tmp_path / "a")
    path = folder / "pred" / "full" / "vt_512.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    torn = b'{"key": "x'
    path.write_bytes(first + json.dumps(json.loads(second) | {name: value}).encode() + b"\n" + torn)
    before = path.read_bytes()
    with pytest.raises(BenchError, match=r"vt_512\.jsonl, line 2 is damaged"):
        report(["a"], tmp_path)
    # what is no file of ours is not repaired either
    with pytest.raises(BenchError, match="line 2"):
        RecordStore(folder).load(repair=True)
    assert path.read_bytes() == before


def test_a_hopeless_likelihood_leaves_the_perplexity_out(stored, tmp_path):
    stored.write(tmp_path / "a", found=stored.lines(meta={"nll": 1e6}))
    assert report(["a"], tmp_path) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())["benchmarks"][0]
    costs = [x["cost"] for m in summary["methods"].values() for x in m["lengths"].values()]
    assert [cost["perplexity"] for cost in costs] == [None] * 4


@pytest.mark.parametrize(
    "place", ["pred", "pred/full", "pred/full/vt_512.jsonl", "errors.log", ".lock", "vllm.log"]
)
def test_a_run_is_not_resumed_through_links(stored, tmp_path, place):
    folder = stored.write(tmp_path / "runs" / "a")
    path, elsewhere = folder / place, tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text("precious")
    path.symlink_to(elsewhere)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(BenchError, match="is a link, which no run makes"):
        open_run(tmp_path / "runs", "a", resume=True, overwrite=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_plots_are_not_written_through_a_link(stored, tmp_path):
    folder = stored.write(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (folder / "plots").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BenchError, match="is a link, which no report makes"):
        report(["a"], tmp_path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["x" * 300, "~nobody-of-this-name/run", "a\0b", "../a/../b", "/proc/self/mem", ""]
)
def test_a_name_that_is_no_run_is_told(tmp_path, name):
    with pytest.raises(BenchError, match="No run "):
        report([name], tmp_path)
