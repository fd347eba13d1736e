"""The Triton kernels against plain torch: in the interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock.policy import AttentionParams
from kvdock_flexprefill import selection

from .harness import options, states

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
def test_kernels_list_the_blocks_of_plain_torch(runs):
    assert len(runs) >= 10
    assert {name: run["blocks"] for name, run in runs.items() if run["blocks"]} == {}
    assert all(run["listed"] > 0 for run in runs.values())


@pytest.mark.interpret
def test_lists_ascend_and_hold_valid_blocks_beyond_their_end(runs):
    assert all(run["ascending"] and run["permutation"] for run in runs.values())


@pytest.mark.interpret
def test_heads_of_both_kinds_were_met(runs):
    assert any(0 < run["aware"] < run["heads"] for run in runs.values())


def test_plain_torch_serves_where_the_kernels_do_not(monkeypatch):
    monkeypatch.setattr(selection, "_kernels", lambda: pytest.fail("no GPU, no kernel"))
    query, key = states(0)
    lists = selection.select(query, key, AttentionParams(0.25), options())
    assert (lists.count > 0).all()
