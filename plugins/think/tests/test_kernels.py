"""The Triton kernel against float64: in the interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock_think import attention


@pytest.fixture(scope="module")
def runs():
    pytest.importorskip("triton")
    program = [sys.executable, str(Path(__file__).with_name("kernel_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
def test_the_kernel_agrees_with_float64(runs):
    assert len(runs) == 35
    limits = {"float16": 2e-3, "bfloat16": 2e-2}
    wrong = {name: e for name, e in runs.items() if not e <= limits.get(name.split()[0], 1e-4)}
    assert wrong == {}


def test_plain_torch_serves_where_the_kernel_does_not(monkeypatch):
    monkeypatch.setattr(attention, "_kernels", lambda: pytest.fail("no GPU, no kernel"))
    keys, rest, values = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 16)
    order = torch.arange(16).expand(1, 1, 16)
    entries = attention.Entries(keys, rest, values, order, [5], [2])
    output, lse = attention.attend(torch.randn(1, 2, 1, 16), entries, 0.25)
    assert output.shape == (1, 2, 1, 16) and lse.shape == (1, 2, 1)
