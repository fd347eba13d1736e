"""Whatever readers are given: a result or the documented error, and no file touched."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from fuzzing import ODD_TEXTS, fuzz, listing, texts, trees, values
from hypothesis import strategies as st

from kvdock.budget import Budget
from kvdock.errors import KVDockError
from kvdock.options import build, describe
from kvdock.registry import default_host
from kvdock_bench.accuracy_tables import accuracy_tables, main_table
from kvdock_bench.columns import make_board
from kvdock_bench.config import load_config
from kvdock_bench.cost_tables import cost_tables
from kvdock_bench.csv_files import csv_files
from kvdock_bench.errors import BenchError
from kvdock_bench.examples import examples
from kvdock_bench.folder import read_run
from kvdock_bench.methods import parse_methods, parse_settings
from kvdock_bench.mixing import check_protocols
from kvdock_bench.placement import parse_placement
from kvdock_bench.plain_json import read_json
from kvdock_bench.records import RecordStore
from kvdock_bench.runs import load_run
from kvdock_bench.summary import summarise
from kvdock_bench.tasks.jsonl import _parsed

pytestmark = pytest.mark.versionless
METHODS = sorted(default_host().available())


def untouched(folder: Path, call, error=BenchError) -> None:
    before = listing(folder)
    with contextlib.suppress(error):
        call()
    assert listing(folder) == before


@pytest.mark.parametrize("method", METHODS)
def test_options(method):
    options = default_host().load(method).options_type()
    names = st.sampled_from([row.name for row in describe(options)] or ["x"])

    @fuzz(st.dictionaries(names | texts, values, max_size=3), label=f"options of {method}")
    def check(given):
        with contextlib.suppress(KVDockError):
            build(options, given)

    check()


@fuzz(values)
def test_budgets(value):
    with contextlib.suppress(KVDockError):
        budget = Budget.parse(value)
        assert budget is None or Budget.parse(str(budget)) == budget


@fuzz(st.lists(texts | texts.map(lambda t: f"snapkv.window={t}"), max_size=3))
def test_settings(given):
    with contextlib.suppress(KVDockError):
        parse_settings(given, {"snapkv"})
        parse_methods(["snapkv"], [], given)


@fuzz(st.lists(texts, max_size=3), st.none() | texts, st.integers(0, 9), st.none() | st.integers())
def test_devices(devices, gp_num, visible, workers):
    with contextlib.suppress(BenchError):
        parse_placement(devices, gp_num, workers=workers, visible=visible)


TAGS = ("!!bool x", "!!timestamp x", "!!int x", "!!float x", "2001-13-45", "!!python/object:os.x")
KEYS = st.sampled_from(
    ["task_names", "length", "num_samples", "generation", "data", "task_args", "jsonl", "extends",
     "max_length", "batch_size", "seed", "template", "benchmark_name"]
)  # fmt: skip
configs = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(":-[]{}&*!|>#'\"? \nab1~", max_size=60).map(str.encode)
    | st.builds(lambda key, tag: f"{key}: {tag}".encode(), KEYS, st.sampled_from(TAGS) | ODD_TEXTS)
    | st.dictionaries(KEYS, trees, max_size=3).map(lambda tree: yaml.safe_dump(tree).encode())
)


@fuzz(content=configs)
def test_yaml_configs(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    untouched(tmp_path, lambda: load_config(path))


lines = (
    st.binary(max_size=60)
    | trees.map(lambda tree: json.dumps(tree).encode())
    | st.builds(
        lambda prompt, references, more: json.dumps(
            {"prompt": prompt, "references": references, **more}
        ).encode(),
        values.filter(lambda value: _writable(value)),
        trees,
        st.dictionaries(st.sampled_from(["metric", "context", "question"]), trees, max_size=1),
    )
    | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b'"\\ud800"', b"\0" * 9])
)


def _writable(value) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return False
    return True


@fuzz(content=st.lists(lines, max_size=3).map(b"\n".join))
def test_jsonl_tasks(tmp_path, content):
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    _parsed.cache_clear()
    untouched(tmp_path, lambda: _parsed(path, 0, 0))


@st.composite
def changed(draw, content) -> bytes:
    """Draw a JSON object, one of whose values is something else."""
    content = json.loads(json.dumps(content))
    place, key = content, draw(st.sampled_from(sorted(content)))
    while draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
        place = place[key]
        key = draw(st.sampled_from(range(len(place)) if isinstance(place, list) else [*place]))
    place[key] = draw(trees)
    return json.dumps(content).encode()


def numbers(folder: Path) -> None:
    """Make all of a report but its drawings."""
    board = make_board([load_run(folder)])
    check_protocols(board, allow_mixed=True)
    summary = summarise(board)
    csv_files([summary])
    for table in (main_table(summary), *accuracy_tables(summary), *cost_tables(summary)):
        table.to_markdown()
    examples(board)


@fuzz(data=st.data())
def test_records(tmp_path, stored, data):
    stored.write(tmp_path, found={"full/vt_512.jsonl": [stored.record()]})
    path = tmp_path / "pred" / "full" / "vt_512.jsonl"
    found = data.draw(lines | changed(json.loads(stored.record().to_line())))
    path.write_bytes(path.read_bytes() + found + b"\n")
    untouched(tmp_path, lambda: RecordStore(tmp_path).load(repair=True))
    untouched(tmp_path, lambda: numbers(tmp_path))


@fuzz(data=st.data())
def test_report_reader(tmp_path, stored, data):
    stored.write(tmp_path, found={"full/vt_512.jsonl": [stored.record()]})
    (tmp_path / "run.json").write_bytes(data.draw(lines | changed(stored.info())))
    untouched(tmp_path, lambda: read_run(tmp_path))
    untouched(tmp_path, lambda: numbers(tmp_path))


def test_numbers_without_end_are_refused_by_name():
    for text in ("1e400", "NaN", "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError):
            read_json(text)
    for value in (10**30, 10**5000, -(10**5000), "9" * 30):
        with pytest.raises(KVDockError, match="Accepted"):
            Budget.parse(value)
    with pytest.raises(BenchError, match="torch sees 2 GPUs"):
        parse_placement(["9" * 5000], visible=2)


@pytest.mark.parametrize("value", TAGS)
def test_yaml_values_that_trip_pyyaml_are_bench_errors(tmp_path, value):
    (tmp_path / "config.yaml").write_text(f"seed: {value}")
    with pytest.raises(BenchError, match="not plain YAML"):
        load_config(tmp_path / "config.yaml")
