"""The Triton kernels against float64: in the interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock.policy import AttentionParams
from kvdock_h2o import scores

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
@pytest.mark.parametrize("measure", ["sums", "lse", "mass"])
def test_kernels_agree_with_float64(runs, measure):
    assert len(runs) >= 16
    assert {name: run[measure] for name, run in runs.items() if run[measure] > 1e-4} == {}


@pytest.mark.interpret
def test_kernels_give_the_same_bits_every_time(runs):
    assert all(run["same"] for run in runs.values())


def test_plain_torch_serves_where_the_kernels_do_not(monkeypatch):
    q, k = torch.randn(1, 4, 9, 64), torch.randn(1, 2, 9, 64)
    monkeypatch.setattr(scores, "_kernels", lambda: pytest.fail("no GPU, no kernel"))
    params = AttentionParams(0.125)
    found = scores.column_sums(q, k, params)
    assert torch.equal(found, scores.reference_column_sums(q, k, params))
