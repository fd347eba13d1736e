"""Attention over slots whose use only the device knows: kernel against float64, and its gate."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvdock.kernels import slots
from kvdock.kernels.decode import attend_slots, without_plans
from kvdock.policy import AttentionParams


@pytest.mark.interpret
def test_the_kernel_agrees_with_float64():
    pytest.importorskip("triton")
    program = [sys.executable, str(Path(__file__).with_name("slots_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 21
    half = {"float16": 4e-3, "bfloat16": 3e-2}
    assert {name: error for name, error in found.items() if error > half.get(name, 2e-5)} == {}


def states(seed=0, batch=2, kv_heads=2, group=2, length=50):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, 1, 16, generator=generator)
    key, value = (torch.randn(batch, kv_heads, length, 16, generator=generator) for _ in range(2))
    return query, key, value


def test_prefixes_and_positions_without_the_kernel():
    query, key, value = states()
    params, used = AttentionParams(0.25), torch.tensor([49, 0])
    column = torch.arange(50).expand(2, 2, 50)
    filled = column <= used[:, None, None]
    wanted = attend_slots(query, key, value, filled, params)
    assert torch.equal(slots.attend_filled(query, key, value, params, used=used), wanted)
    position = torch.where(filled, column, -1).int()
    for ends in (used, None):
        found = slots.attend_filled(query, key, value, params, position=position, used=ends)
        assert torch.equal(found, wanted)
    assert not torch.equal(slots.attend_filled(query, key, value, params), wanted)


def right(query, key, value, params, arrived, *, position, used):
    return attend_slots(query, key, value, position >= 0, params)


def deaf_to_holes(query, key, value, params, arrived, *, position, used):
    return attend_slots(query, key, value, (position >= 0).cummax(-1).values, params)


@pytest.mark.parametrize("form", [slots.Form(), slots.Form(ends=False)])
@pytest.mark.parametrize(("kernel", "good"), [(right, True), (deaf_to_holes, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_is_tried_before_it_is_trusted(kernel, good, dtype, form):
    error = slots._error(kernel, torch.device("cpu"), dtype, 4, 64, 64, form)
    assert (error < slots.TOLERANCE[dtype]) == good


def test_what_is_not_a_number_is_not_trusted():
    def broken(query, *rest, **more):
        return query.transpose(1, 2) * float("nan")

    assert slots._error(broken, torch.device("cpu"), torch.float32, 1, 16, 16) == float("inf")


def test_a_kernel_that_cannot_run_is_named_once(caplog):
    slots.tried.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kvdock"):
        for _ in range(2):
            assert slots.tried(torch.device("meta"), torch.float32, 4, 64, 64) is None
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "decode attends through masks, several times slower"
    ]
    slots.tried.cache_clear()


def test_no_plans_are_made_for_the_cpu():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with without_plans(torch.zeros(1)):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
