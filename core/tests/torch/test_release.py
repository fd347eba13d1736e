"""The kernels that give entries up in decode against float64 and against the policies' own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    for plugin in ("streamingllm", "h2o", "cakekv"):
        pytest.importorskip(f"kvdock_{plugin}")
    program = [sys.executable, str(Path(__file__).with_name("release_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
def test_kernels_give_up_what_float64_says(found):
    runs = found["kernels"]
    assert len(runs) == 12
    assert {name: error for name, (error, _) in runs.items() if not error < 1e-6} == {}
    assert [name for name, (_, right) in runs.items() if not right] == []


@pytest.mark.interpret
def test_answers_and_kept_entries_are_those_of_the_policies(found):
    for name, run in found["models"].items():
        assert run["used"] == [False, False, True, True], name
        assert run["same"], name


@pytest.mark.interpret
def test_kernels_that_differ_on_a_small_case_are_refused(found):
    assert found["refused"] == {"same": True, "used": [False] * 4}
