"""The Triton kernels of block-sparse attention against float64, interpreted or on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.versionless


@pytest.fixture(scope="module")
def found():
    program = [sys.executable, str(Path(__file__).with_name("sparse_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
@pytest.mark.parametrize("measure", ["output", "lse"])
def test_kernel_agrees_with_float64(found, measure):
    runs = found["runs"]
    assert len(runs) >= 16
    assert {name: run[measure] for name, run in runs.items() if not run[measure] < 1} == {}


@pytest.mark.interpret
def test_rows_without_blocks_have_no_sum(found):
    assert all(run["empty"] for run in found["runs"].values())


@pytest.mark.interpret
def test_lists_from_a_mask(found):
    assert found["compaction"]


@pytest.mark.interpret
def test_layouts_for_descriptors(found):
    assert found["descriptors"] == {
        "usual": True, "odd head_dim": False, "odd start": False, "odd rows": False
    }  # fmt: skip
