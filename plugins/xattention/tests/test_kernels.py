"""The Triton kernels against float64: in the interpreter, or on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock.policy import AttentionParams
from kvdock_xattention import select as selection
from kvdock_xattention.options import XAttentionOptions

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
def test_masses_are_those_of_float64(runs):
    assert len(runs) >= 15
    assert {name: run["mass"] for name, run in runs.items() if run["mass"] > 1e-5} == {}


@pytest.mark.interpret
def test_lists_are_those_of_plain_torch_in_float64(runs):
    assert {name: run["differ"] for name, run in runs.items() if run["differ"]} == {}
    assert sum(run["kept"] for run in runs.values()) > 300


@pytest.mark.interpret
def test_lists_ascend_and_hold_valid_blocks_only(runs):
    assert all(run["ascending"] and run["valid"] for run in runs.values())


def test_plain_torch_serves_where_there_is_no_gpu(monkeypatch):
    query, key = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    monkeypatch.setattr(selection, "_kernels", lambda: pytest.fail("no GPU, no kernel"))
    call = (query, key, AttentionParams(0.25), XAttentionOptions())
    found, wanted = selection.select(*call), selection.select_reference(*call)
    assert torch.equal(found.index, wanted.index)
    assert torch.equal(found.count, wanted.count)


@pytest.mark.parametrize("limit", [1, 10**6, 3 * 10**6, 10**9])
def test_parts_cover_the_work_once_and_fit_the_limit(limit):
    from kvdock_xattention.grid import TileGrid
    from kvdock_xattention.pipeline import level_row, parts
    from kvdock_xattention.score import Shape

    grid, shape = TileGrid(20_000, 30_001, 8), Shape(band=2)
    groups = -(-grid.query_tiles // shape.queries)
    seen = []
    for part in parts(6, 4, grid, shape, limit):
        size = 4 * part.pairs * 4 * (part.high - part.low) * shape.queries * level_row(grid)
        assert size <= limit or (part.pairs == 1 and part.high - part.low <= shape.band)
        pairs = range(part.pair, part.pair + part.pairs)
        seen += [(pair, group) for pair in pairs for group in range(part.low, part.high)]
    assert sorted(seen) == [(pair, group) for pair in range(6) for group in range(groups)]
