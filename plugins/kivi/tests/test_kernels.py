"""The Triton kernels against float64 and plain torch: in the interpreter, or on a GPU if any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock_kivi import attention, writing

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def runs():
    program = [sys.executable, str(Path(__file__).with_name("kernel_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
@pytest.mark.parametrize("measure", ["output", "lse"])
def test_decode_and_later_turns_agree_with_float64(runs, measure):
    assert len(runs["attention"]) >= 10
    errors = {name: run[measure] for name, run in runs["attention"].items()}
    assert {name: error for name, error in errors.items() if not error <= 2e-3} == {}


@pytest.mark.interpret
def test_half_precision_answers_are_as_near_as_a_half_can_be(runs):
    assert len(runs["turns"]) == (93 if torch.cuda.is_available() else 26)
    errors = {name: run["output"] for name, run in runs["turns"].items()}
    assert {name: error for name, error in errors.items() if not error <= 2e-3} == {}
    # a float16 below 4 is rounded by 2^-10 at most; a turn's own errors stay far below that
    levels = {name: run["lse"] for name, run in runs["turns"].items() if "Q=1" not in name.split()}
    assert {name: error for name, error in levels.items() if not error <= 4e-4} == {}


@pytest.mark.interpret
def test_packing_leaves_the_bytes_that_plain_torch_leaves(runs):
    assert len(runs["packing"]) >= 4
    assert {name: wrong for name, wrong in runs["packing"].items() if wrong} == {}


def test_plain_torch_serves_where_the_kernels_do_not(monkeypatch):
    monkeypatch.setattr(writing, "_kernels", lambda: pytest.fail("no GPU, no kernel"))
    for dtype in (torch.float16, torch.float32):
        states = torch.zeros(1, 1, 1, 32, dtype=dtype)
        assert writing.kernels_for(states) is None and attention.kernel_for(states) is None
