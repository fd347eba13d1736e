"""Whatever writers are given, and wherever the disk fails: all of a file or what was there."""

import contextlib
import os
import shutil
from dataclasses import fields, replace

import pytest
from fuzzing import CASES, TOTAL, fuzz, listing, ran, texts, trees
from hypothesis import strategies as st

from kvdock.errors import KVDockError
from kvdock.registry import Host
from kvdock.scaffold import create
from kvdock_bench.atomic import write_json
from kvdock_bench.errors import BenchError
from kvdock_bench.folder import open_run
from kvdock_bench.plain_json import read_json
from kvdock_bench.record import Record
from kvdock_bench.records import RecordStore

pytestmark = pytest.mark.versionless
HOST = Host(discover=False)


@fuzz(content=trees)
def test_json_writer(tmp_path, content):
    (tmp_path / "run.json").write_text("of yesterday")
    before = listing(tmp_path)
    try:
        write_json(tmp_path / "run.json", content)
    except ValueError:  # numbers that JSON lacks
        assert listing(tmp_path) == before
    else:
        assert os.listdir(tmp_path) == ["run.json"]
        assert read_json((tmp_path / "run.json").read_text()) == content


FIELDS = {"str": texts, "str | None": texts, "float | None": st.floats(), "int": st.integers()}


@fuzz(data=st.data())
def test_record_writer(tmp_path, stored, data):
    kinds = {field.name: FIELDS[field.type] for field in fields(Record) if field.type in FIELDS}
    name = data.draw(st.sampled_from(sorted(kinds)))
    record = replace(stored.record(), **{name: data.draw(kinds[name])})
    path = tmp_path / "pred" / "full" / "vt_512.jsonl"
    before = path.read_bytes() if path.exists() else b""
    try:
        RecordStore(tmp_path).append("full/vt_512", record)
    except ValueError:  # numbers that JSON lacks
        assert not path.exists() or path.read_bytes() == before
    else:
        line = path.read_bytes().removeprefix(before)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        with contextlib.suppress(ValueError):  # a score above 1
            assert Record.from_line(line) == record


CALLS = st.sampled_from(["os.write", "os.fsync", "os.replace", "os.rename", "os.mkdir", "os.chmod"])


@fuzz(call=CALLS, at=st.integers(0, 30), order=st.permutations(range(4)))
def test_writers_on_a_failing_disk(tmp_path, stored, call, at, order):
    left = iter(range(at + 1))
    real = getattr(os, call.removeprefix("os."))

    def failing(*given_, **more):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return real(*given_, **more)

    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text("of yesterday")
    store = RecordStore(folder)
    before = listing(tmp_path)
    writers = (
        lambda: write_json(folder / "run.json", {"status": "x"}),
        lambda: store.append("full/vt_512", stored.record()),
        lambda: create("demo-method", tmp_path / "deep" / "demo", HOST),
        lambda: open_run(tmp_path, "run", resume=False, overwrite=True),
    )
    for write in (writers[place] for place in order):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(call, failing)
            with contextlib.suppress(OSError, KVDockError):
                write()
    after = listing(tmp_path)
    assert not [name for name in after if "/." in f"/{name}" and not name.endswith(".lock")]
    texts_ = [content for name, content in after.items() if name.endswith("run.json")]
    assert texts_ and set(texts_) <= {b"of yesterday", b'{\n  "status": "x"\n}\n'}
    for name, content in after.items():
        if name.endswith(".jsonl"):
            assert [Record.from_line(line) for line in content.splitlines()]
        if name.endswith("deep/demo"):
            assert {"pyproject.toml", "README.md", "src", "tests"} <= set(os.listdir(name))
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    assert set(before) == {str(folder), str(folder / "run.json")}


@fuzz(tag=texts | st.sampled_from(["..", "a/b", "CON", "nul.txt", "a.", "a ", "a\\b", "C:x"]))
def test_tags(tmp_path, tag):
    try:
        folder = open_run(tmp_path, tag, resume=False, overwrite=False)
    except BenchError:
        assert os.listdir(tmp_path) == []
    else:
        assert folder.parent == tmp_path and os.listdir(tmp_path) == [folder.name]
        folder.rmdir()


@fuzz(name=texts | st.text("aZ9-_.", max_size=45))
def test_names_of_new_methods(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try:
        folder = create(name, host=HOST)
    except KVDockError:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == [folder.name]
        shutil.rmtree(folder)


def test_as_many_cases_ran_as_were_asked_for():
    """Comes last; how many there were is on its output."""
    print(f"{sum(ran.values())} cases of {len(ran)} readers and writers")
    assert {name: count for name, count in ran.items() if count < CASES} == {}
    assert sum(ran.values()) >= TOTAL
