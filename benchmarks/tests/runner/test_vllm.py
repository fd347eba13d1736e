"""vLLM as another server: the real worker program, with a stand-in for the vllm package."""

import json
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.session import bench
from kvdock_bench.vllm import locate
from kvdock_bench.vllm.process import Worker

FAKE = Path(__file__).with_name("fake_vllm")
SAMPLES = 2 * 2


@pytest.fixture
def python(tmp_path) -> Path:
    """Another interpreter, to all appearances: it imports the stand-in."""
    path = tmp_path / "fake-python"
    command = shlex.join([sys.executable, "-c", _GUARD])
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(FAKE))} exec {command} "$@"\n')
    path.chmod(0o755)
    return path


# the worker may import nothing of ours
_GUARD = """
import runpy, sys
sys.modules["kvdock_bench"] = sys.modules["kvdock"] = None
runpy.run_path(sys.argv[-1], run_name="__main__")
"""


@pytest.fixture
def served(arguments, python, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        "task_names: [niah_single_1]\nlength: [640, 768]\nnum_samples: 2\n"
        "generation: {max_new_tokens: 6}\n"
    )
    return replace(arguments, cfg_path=str(config), server=("vllm",), vllm_python=str(python))


def records(arguments):
    return [
        json.loads(line)
        for path in sorted((arguments.output_dir / "run" / "pred").glob("*/*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def table(arguments):
    return (arguments.output_dir / "run" / "table.md").read_text()


def test_both_servers_stand_in_one_table(served, capsys):
    assert bench(replace(served, server=("vllm", "transformers"))) == 0
    found = records(served)
    full = [r for r in found if r["method_id"] == "full"]
    vllm = [r for r in found if r["method_id"] == "vllm"]
    assert len(full) == len(vllm) == SAMPLES
    for ours, theirs in zip(full, vllm, strict=True):
        for name in ("prompt_sha", "references", "n_prompt_tokens", "device", "task", "length"):
            assert ours[name] == theirs[name]
        assert ours["protocol_id"] == theirs["protocol_id"]
    assert "| Length | Full cache | vLLM |" in table(served)
    assert "## Difference to the full cache\n\n| Length | vLLM |" in table(served)
    run = json.loads((served.output_dir / "run" / "run.json").read_text())
    assert [method["method_id"] for method in run["methods"]] == ["full", "vllm"]
    assert run["vllm"]["versions"]["vllm"] == "0.0.fake"
    assert run["model"]["attention"] == "sdpa"
    assert "0.0.fake" in (served.output_dir / "run" / "report.html").read_text()


def test_answers_times_and_memory_are_read_as_for_transformers(served):
    bench(served)
    for record in records(served):
        assert record["n_new_tokens"] == 4
        assert record["finish_reason"] == "stop"
        assert "</s>" not in record["prediction"]
        times = record["timings"]
        assert (times["prefill_s"], times["ttft_s"]) == (0.5, 0.6)
        assert times["decode_s"] == pytest.approx(0.6)
        assert times["tpot_s"] == pytest.approx(0.6 / 3)
        # 2 layers, 2 KV heads, keys and values of 8 float32; blocks of 16
        blocks = -(-record["n_prompt_tokens"] // 16)
        assert record["memory"]["kv_bytes"] == 256 * 16 * blocks
        assert record["memory"]["kv_full_bytes"] == 256 * record["n_prompt_tokens"]
        assert record["memory"]["peak_alloc_bytes"] is None


def test_vllm_alone_has_a_table_and_joins_an_earlier_run(served):
    assert bench(served) == 0
    assert "| Length | vLLM |" in table(served)
    assert "Difference" not in table(served)
    assert bench(replace(served, server=("transformers",), vllm_python=None, resume=True)) == 0
    assert "| Length | Full cache | vLLM |" in table(served)
    assert len(records(served)) == 2 * SAMPLES


def test_prints_go_to_the_log_and_never_into_the_protocol(served, python):
    bench(served)
    log = (served.output_dir / "run" / "vllm.log").read_text()
    for text in ("a line on stdout", "forged", "a child prints", "importing", "generating"):
        assert text in log


def test_lines_that_are_no_messages_are_skipped(tmp_path):
    program = tmp_path / "noisy.py"
    program.write_text(
        "print('{not json')\nprint('[1]')\nprint('{\"a\": 1}')\n"
        'input()\nprint(\'{"event": "ready", "x": 1}\')\n'
    )
    worker = Worker(Path(sys.executable), tmp_path / "log", program=program)
    assert worker.start() == {"event": "ready", "x": 1}
    worker.close()
    assert (tmp_path / "log").read_text() == '{not json\n[1]\n{"a": 1}\n'


def test_a_worker_that_dies_is_told_and_the_run_resumes(served, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "dies")
    with pytest.raises(BenchError, match=r"ended \(signal SIGKILL\).*--resume(.|\n)*vllm.log"):
        bench(served)
    first = records(served)
    assert len(first) == 2
    run = json.loads((served.output_dir / "run" / "run.json").read_text())
    assert run["status"] == "failed"
    monkeypatch.delenv("FAKE_VLLM")
    assert bench(replace(served, resume=True)) == 0
    found = records(served)
    assert len(found) == len({r["key"] for r in found}) == SAMPLES
    assert all(record in found for record in first)
    # nothing is left to do: the engine is not even started
    log = served.output_dir / "run" / "vllm.log"
    before = log.read_bytes()
    assert bench(replace(served, resume=True)) == 0
    assert log.read_bytes() == before


def test_an_error_of_the_engine_is_one_sample_s_error(served, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "stumbles")
    assert bench(served) == 1
    (failed,) = [r for r in records(served) if r["error"]]
    assert failed["error"] == "RuntimeError: vLLM: ValueError: a bad kernel"


def test_the_engine_runs_a_models_own_code_only_if_asked(served, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "remote code")
    with pytest.raises(BenchError, match="AssertionError"):
        bench(served)
    assert bench(replace(served, trust_remote_code=True, overwrite=True)) == 0
    run = json.loads((served.output_dir / "run" / "run.json").read_text())
    assert run["vllm"]["engine"]["trust_remote_code"] is True


def test_out_of_memory_halves_the_batch(served, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "small")
    assert bench(replace(served, batch_size="3")) == 0
    assert {r["batch_size"] for r in records(served)} == {1}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no start", "does not start: ValueError: no room for the cache"),
        ("root cause", "does not start: ValueError: memory is too small"),
        ("short", r"answer of up to 6 exceed vLLM's max_model_len 700, and nothing is cut"),
        ("cuts", "vLLM read 6.. tokens of a prompt of 6"),
    ],
)
def test_what_cannot_be_right_is_refused(served, monkeypatch, mode, message):
    monkeypatch.setenv("FAKE_VLLM", mode)
    with pytest.raises(BenchError, match=message):
        bench(served)
    # the short one's prompts of 640 tokens fit and stay
    assert len(records(served)) == (SAMPLES // 2 if mode == "short" else 0)


def test_no_process_outlives_the_run(served, monkeypatch, tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"event": "ready", "child": %d}\' % child.pid, flush=True)\n'
        "sys.stdin.read()\n"
    )
    worker = Worker(Path(sys.executable), tmp_path / "log", program=program)
    child = worker.start()["child"]
    worker.close()
    for _ in range(100):
        # an orphan is reaped by whoever adopts it
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in _status(child):
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def _status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "\nState:\tZ"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": ("rwkv",)}, "--server rwkv is unknown"),
        ({"server": ("vlm",)}, "Did you mean 'vllm'"),
        ({"acceleration": ("fake",)}, "--server transformers vllm"),
        ({"vllm_python": "/no/such/python"}, "no program that can be run"),
        ({"server": ("transformers",)}, "--vllm_python is for vLLM"),
        ({"server": ("transformers",), "vllm_python": None, "max_model_len": 9}, "is for vLLM"),
    ],
)
def test_wrong_values_are_told_before_anything_runs(served, changes, message):
    with pytest.raises(BenchError) as caught:
        bench(replace(served, **changes))
    assert message in str(caught.value)
    assert not served.output_dir.exists()


def test_sampling_is_refused(served, tmp_path):
    config = tmp_path / "drawn.yaml"
    config.write_text(
        "task_names: [niah_single_1]\nlength: 640\ngeneration: {do_sample: true}\nnum_samples: 1\n"
    )
    with pytest.raises(BenchError, match="greedy only"):
        bench(replace(served, cfg_path=str(config)))


def test_the_interpreter_is_looked_for_in_three_places(monkeypatch, tmp_path, python):
    monkeypatch.delenv(locate.VARIABLE, raising=False)
    monkeypatch.setattr(locate, "NOX", tmp_path / "none")
    with pytest.raises(BenchError, match=r"nox -s vllm-env(.|\n)*KVDOCK_VLLM_PYTHON"):
        locate.find_python(None)
    monkeypatch.setattr(locate, "NOX", python)
    assert locate.find_python(None) == python
    monkeypatch.setenv(locate.VARIABLE, sys.executable)
    assert locate.find_python(None) == Path(sys.executable)
    assert locate.find_python(str(python)) == python


def test_nothing_but_the_worker_imports_vllm(served):
    package = Path(locate.__file__).parents[1]
    importing = re.compile(r"^\s*(import|from) vllm\b", re.MULTILINE)
    found = [path.name for path in package.rglob("*.py") if importing.search(path.read_text())]
    assert found == ["worker.py"]
    bench(served)
    assert "vllm" not in sys.modules
