"""The script that compares two devices with one: one real run on CPU, and what may go wrong."""

import contextlib
import importlib
import json
import multiprocessing
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvdock_bench.errors import BenchError

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = ("recording", "two_gpus", "two_gpus_worker")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("two_gpus")
    for name in MODULES:
        sys.modules.pop(name, None)


def start(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", "--device", "cpu", *map(str, words)])
    return script.main()


@pytest.mark.slow
def test_two_processes_of_a_cpu_split_the_model(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "two.json"
    words = ("--methods", "full", "h2o", "nowhere", "--tokens", "97", "--new", "6", "--out", out)
    code = start(script, monkeypatch, *words, "--seconds", "300", "--patience", "200")
    record = json.loads(out.read_text())
    full, h2o, nowhere = record["rows"]
    assert full["same"] and h2o["same"], record
    assert h2o["bytes_held"] == [h2o["bytes_held_on_one"] // 2] * 2
    assert h2o["tokens"] == full["tokens"] == 18
    assert "nowhere" in nowhere["error"] and not nowhere["same"]
    assert (code, record["same"]) == (1, 2)
    assert record["environment"]["command"].startswith("python benchmarks/scripts/two_gpus.py")
    assert {"commit", "software", "hardware"} <= set(record["environment"])
    assert "| float32 | tp | h2o | yes | 18 |" in capsys.readouterr().out


def answer(script, **changes):
    made = script.Answer("m", ((1, 2, 3), (4, 5, 6)), ((1.0, 2.0, 3.0), (4.0, 0.5, 6.0)), 64)
    return replace(made, **changes)


def row(script, one, *others):
    (made,) = script.compare("float32", "tp", {"m": [one]}, {"m": list(others)})
    return made


def test_what_counts_as_the_same(script):
    one, half = answer(script), answer(script, bytes_held=32)
    assert row(script, one, half, half)["same"]
    assert row(script, one, half, half)["smallest_margin"] == 0.5
    assert row(script, one, answer(script))["same"]
    bytes_off = row(script, one, one, half)
    assert not bytes_off["same"] and bytes_off["first_difference"] is None
    other = answer(script, bytes_held=32, tokens=((1, 2, 9), (4, 9, 6)))
    tokens_off = row(script, one, half, other)
    assert not tokens_off["same"]
    assert tokens_off["first_difference"] == {"step": 1, "row": 1, "margin": 0.5}
    shorter = answer(script, tokens=((1, 2), (4, 5)))
    assert not row(script, one, shorter)["same"]


def test_an_error_on_either_side_is_told(script):
    broken = answer(script, error="RuntimeError: x")
    assert row(script, answer(script), answer(script), broken)["error"] == "RuntimeError: x"
    assert row(script, broken, answer(script))["error"] == "on one device: RuntimeError: x"


class Kept:
    """The end of a pipe that a thread keeps when its parent closes it."""

    def __init__(self, end):
        self.end, self.send, self.recv = end, end.send, end.recv

    def close(self):
        pass


class Thread:
    """A process that is none, ended by its own script."""

    exitcode = -9

    def __init__(self, target, args, daemon):
        def run():
            with contextlib.suppress(OSError):  # killed, as far as a thread can be
                target(*args)
            args[-1].end.close()

        self._thread = threading.Thread(target=run, daemon=daemon)
        self.start, self.join = self._thread.start, self._thread.join

    def kill(self):
        pass


class Context:
    Process = Thread

    @staticmethod
    def Pipe():
        ours, theirs = multiprocessing.Pipe()
        return ours, Kept(theirs)


@pytest.fixture
def group(script, monkeypatch):
    """Run a group of two processes, the second of which does what is said for a method."""

    def make(deeds, patience=30.0, deadline=20.0):
        begun = []

        def serve(task, dtype, place, methods, pipe):
            begun.append(methods)
            if deeds.get("load"):
                pipe.send(deeds["load"])
                return
            pipe.send(None)
            for method in methods:
                deed = deeds.get(method) if place.rank else None
                if deed == "hangs":
                    time.sleep(0.6)
                if deed in ("dies", "hangs"):
                    return
                pipe.send(script.Answer(method, error=deed, broken=deed == "breaks"))
            with contextlib.suppress(EOFError):
                pipe.recv()

        monkeypatch.setattr(script.multiprocessing, "get_context", lambda kind: Context)
        monkeypatch.setattr(script, "serve", serve)
        task = script.Task("", False, (8,), 1)
        made = script.Group(task, "float32", "tp", ("cpu", "cpu"), ("a", "b", "c"), patience)
        script.run([made], time.monotonic() + deadline)
        errors = {m: [a.error for a in found if a.error] for m, found in made.answers.items()}
        return errors, begun

    return make


@pytest.mark.parametrize(
    ("deed", "message"), [("breaks", "breaks"), ("dies", "a process ended with code -9")]
)
def test_a_broken_method_does_not_hide_the_next(group, deed, message):
    errors, begun = group({"b": deed})
    assert errors == {"a": [], "b": [message], "c": []}
    assert begun == [("a", "b", "c")] * 2 + [("c",)] * 2


def test_a_refused_method_breaks_nothing(group):
    errors, begun = group({"b": "refused"})
    assert errors == {"a": [], "b": ["refused"], "c": []}
    assert len(begun) == 2


def test_a_method_that_hangs_is_left(group):
    errors, _ = group({"b": "hangs"}, patience=0.2)
    assert errors["b"] == ["no answer within 0 s"]
    assert errors["c"] == []


def test_a_model_that_cannot_be_loaded_is_an_error_of_every_method(group):
    errors, begun = group({"load": "BenchError: no plan"})
    assert errors == {method: ["BenchError: no plan"] for method in "abc"}
    assert len(begun) == 2


def test_what_is_not_reached_in_time_is_told(group):
    errors, _ = group({"b": "hangs"}, deadline=0.0)
    assert errors["c"] == ["not reached in time"]


def test_two_gpus_have_to_be_there(script, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["two_gpus.py"])
    with pytest.raises(BenchError, match="--device 1: torch sees 1 GPU"):
        script.main()
