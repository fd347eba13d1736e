"""How a row is shared among programs, and the merge of what they found, against float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock.kernels.split_kv import merge_splits, multiprocessors, split_count

pytestmark = pytest.mark.versionless


@pytest.mark.parametrize("rows", [1, 8, 64, 132, 1000])
@pytest.mark.parametrize("tokens", [1, 63, 1024, 4096, 32_768, 131_072])
def test_a_split_has_work_and_the_grid_is_full_where_it_can_be(rows, tokens):
    splits = split_count(rows, 132, tokens)
    tiles = -(-tokens // 64)
    assert 1 <= splits <= min(tiles, 128)
    waves = -(-rows * splits // 264)
    if tiles >= 512 and 8 <= rows < 264:
        assert rows * splits / (waves * 264) > 0.75
    longest = waves * -(-tiles // splits)
    assert longest <= -(-rows // 264) * tiles, "splitting must not take longer than not splitting"


def test_one_row_of_many_tokens_fills_the_gpu_once():
    assert split_count(8, 132, 32_768) == 32
    assert split_count(8, 132, 32_768, resident=1) == 16
    assert split_count(1000, 132, 64) == 1


def test_the_count_is_the_same_within_a_tile():
    assert {split_count(8, 132, n) for n in range(4033, 4097)} == {split_count(8, 132, 4096)}


def test_a_device_without_multiprocessors_counts_as_one():
    assert multiprocessors(torch.device("cpu")) == 1


def partial(lead=(2, 3), splits=4, rows=5, dim=16):
    torch.manual_seed(splits)
    return torch.randn(*lead, splits, rows, dim), torch.randn(*lead, splits, rows) * 3


def test_parts_of_one_softmax_merge_to_the_whole():
    q, k, v = (torch.randn(n, 16, dtype=torch.float64) for n in (5, 40, 40))
    scores = q @ k.T
    parts = [slice(0, 7), slice(7, 30), slice(30, 40)]
    output = torch.stack([scores[:, part].softmax(-1) @ v[part] for part in parts])
    lse = torch.stack([scores[:, part].logsumexp(-1) for part in parts])
    merged, total = merge_splits(output.float(), lse.float())
    assert torch.allclose(merged.double(), scores.softmax(-1) @ v, atol=1e-6)
    assert torch.allclose(total.double(), scores.logsumexp(-1), atol=1e-6)


def test_splits_without_entries_are_not_read():
    output, lse = partial()
    wanted, level = merge_splits(output[..., :2, :, :], lse[..., :2, :])
    output[..., 2:, :, :], lse[..., 2:, :] = float("nan"), float("-inf")
    merged, total = merge_splits(output, lse)
    assert torch.equal(merged, wanted) and torch.equal(total, level)


def test_rows_without_entries_are_zero():
    output, lse = partial()
    lse[..., 1] = float("-inf")
    merged, total = merge_splits(output, lse, torch.float16)
    assert merged.dtype == torch.float16 and total.dtype == torch.float32
    assert not merged[..., 1, :].any() and bool(total[..., 1].isneginf().all())
    assert bool(merged.isfinite().all())


@pytest.mark.interpret
def test_the_kernel_agrees_with_float64():
    pytest.importorskip("triton")
    program = [sys.executable, str(Path(__file__).with_name("split_kv_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    half = {"float16": 2e-3, "bfloat16": 2e-2}
    limits = {name: half.get(name, 1e-5) for name in found}
    assert {name: run for name, run in found.items() if max(run.values()) > limits[name]} == {}
