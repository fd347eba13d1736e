import dataclasses
import json
import os

import pytest

from kvdock_bench.atomic import write_json
from kvdock_bench.errors import BenchError
from kvdock_bench.folder import read_run
from kvdock_bench.record import OOM, UNFIT, MemoryUse, Record, Timings
from kvdock_bench.records import RecordStore, read_records

CELL = "full/task_640"


def make(key="k0", **changes):
    record = Record(
        key=key,
        method_id="full",
        method="Full cache",
        task="task",
        length=640,
        index=0,
        seed=42,
        prompt_sha="0",
        n_prompt_tokens=600,
        units=3,
        references=["1", "2"],
        data_source="offline substitute: x",
        device="cpu",
        batch_size=1,
        prediction="one\ntwo \u2028 \ud800 \0",
        score=0.5,
        n_new_tokens=3,
        finish_reason="stop",
        timings=Timings(0.1, 0.2, 0.3, None, 0.5),
        memory=MemoryUse(None, 10, 20, 0.5),
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path)
    for index in range(3):
        store.append(CELL, make(f"k{index}", index=index))
    return store


def path_of(store):
    return store.folder / f"{CELL}.jsonl"


def test_a_record_is_one_line_and_comes_back_equal(store):
    content = path_of(store).read_bytes()
    assert content.count(b"\n") == 3
    assert list(read_records(path_of(store))) == [make(f"k{i}", index=i) for i in range(3)]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_neither_written_nor_read(store, tmp_path, score):
    path = path_of(store)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append(CELL, make("k9", score=score))
    assert path.read_bytes() == before
    lines = before.splitlines(keepends=True)
    assert b'"score":0.5' in lines[1]
    word = json.dumps(score).encode()
    path.write_bytes(lines[0] + lines[1].replace(b'"score":0.5', b'"score":' + word))
    with pytest.raises(
        BenchError, match=rf"task_640\.jsonl, line 2 is damaged: {word.decode()} is"
    ):
        RecordStore(tmp_path).load(repair=True)


def test_half_a_character_comes_back_from_a_json_file(tmp_path):
    path = tmp_path / "run.json"
    content = {"command": "--template \ud800", "whole": "\U0001f600"}
    write_json(path, content)
    assert read_run(tmp_path) == content
    assert path.read_bytes().isascii() is False
    assert rb"\ud800" in path.read_bytes()


def test_every_cut_loses_only_the_cut_line(store, tmp_path):
    path = path_of(store)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        again = RecordStore(tmp_path)
        again.load(repair=True)
        whole = sum(end <= cut for end in ends)
        assert set(again.by_key) == {f"k{i}" for i in range(whole)}
        assert path.read_bytes() == content[: ends[whole - 1] if whole else 0]


def test_a_torn_line_is_left_alone_without_repair(store, tmp_path):
    path = path_of(store)
    path.write_bytes(path.read_bytes()[:-5])
    torn = path.read_bytes()
    reader = RecordStore(tmp_path)
    reader.load(repair=False)
    assert set(reader.by_key) == {"k0", "k1"}
    assert path.read_bytes() == torn


@pytest.mark.parametrize("damage", [b"{}", b"not json", b"[1]", b"\0\0\0", b"", b'{"key": 1}'])
def test_a_damaged_line_names_file_and_line(store, tmp_path, damage):
    path = path_of(store)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + lines[2])
    with pytest.raises(BenchError, match=r"task_640\.jsonl, line 2 is damaged"):
        RecordStore(tmp_path).load(repair=True)


def test_a_wrongly_typed_field_is_damage(store, tmp_path):
    path = path_of(store)
    content = json.loads(path.read_bytes().splitlines()[0])
    path.write_text(json.dumps(content | {"length": "640"}) + "\n")
    with pytest.raises(BenchError, match="line 1"):
        RecordStore(tmp_path).load(repair=True)


def test_the_last_record_of_a_key_wins(store, tmp_path):
    store.append(CELL, make("k1", index=1, prediction="later"))
    again = RecordStore(tmp_path)
    again.load(repair=True)
    assert len(again.by_key) == 3
    assert again.by_key["k1"].prediction == "later"


def test_only_unexpected_errors_are_done_again(store):
    blank = {"prediction": None, "score": None, "timings": None, "memory": None}
    store.append(CELL, make("oom", error=OOM, **blank))
    store.append(CELL, make("unfit", error=UNFIT, **blank))
    store.append(CELL, make("bug", error="ValueError: x", **blank))
    done = [key for key in ("k0", "oom", "unfit", "bug", "new") if store.is_finished(key)]
    assert done == ["k0", "oom", "unfit"]


def test_a_full_disk_leaves_no_part_of_a_line(store, monkeypatch):
    before = path_of(store).read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: real(handle, line[:20]))
    with pytest.raises(BenchError, match="Cannot write"):
        store.append(CELL, make("k9"))
    assert path_of(store).read_bytes() == before
    assert "k9" not in store.by_key
