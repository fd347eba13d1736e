"""The fused kernels of a decode step against the operations they replace, and their gate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kvdock
from kvdock.fused import FusedStep, fused_step
from kvdock.testing import tiny_model


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    program = [sys.executable, str(Path(__file__).with_name("step_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
def test_kernels_agree_with_the_operations_they_replace(found):
    limits = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 4e-2}
    runs = found["kernels"]
    assert len(runs) >= 18
    assert {name: error for name, error in runs.items() if error > limits[name.split()[1]]} == {}
    exact = {name: error for name, error in runs.items() if name.startswith("turn")}
    assert set(exact.values()) == {0.0}, "a turn has no sum whose order could differ"
    assert found["appends"]


@pytest.mark.interpret
def test_steps_of_all_families(found):
    for family, run in found["families"].items():
        assert run["error"] < 3e-5, family
        assert run["left"] == [], family
        per_layer = {"glm4": 5, "qwen3": 7}.get(family, 5)  # norms, MLP, attention, layer
        assert run["fused"] == run["layers"] * per_layer + 1, family


def like(rms_norm):
    """Return a module of kernels in plain torch, with a norm to be judged."""

    def add_rms_norm(left, right, weight, eps):
        return left + right, rms_norm(left + right, weight, eps)

    def rotate(query, key, cos, sin):
        raise RuntimeError("no compiler")

    return SimpleNamespace(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rotate=rotate,
        gated=lambda gate, up: nn.functional.silu(gate) * up,
    )


def fused_names(model, rms_norm):
    with kvdock.attach(model, "streamingllm", budget=32):
        step = FusedStep(model, like(rms_norm))
    return sorted({type(module).__name__ for module, _ in step._forwards})


def right(states, weight, eps):
    return weight * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps))


def test_a_kind_that_differs_or_fails_keeps_its_own_operations():
    pytest.importorskip("kvdock_streamingllm")
    model = tiny_model("llama")
    names = fused_names(model, right)
    assert names == ["LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm"], "attention cannot be turned"
    assert fused_names(model, lambda *given: right(*given) * 1.001) == ["LlamaMLP"]


def test_forwards_of_others_are_left_alone():
    pytest.importorskip("kvdock_streamingllm")
    model = tiny_model("llama")
    mlps = [module for module in model.modules() if type(module).__name__ == "LlamaMLP"]
    for module in mlps:
        module.forward = lambda states: states
    try:
        assert "LlamaMLP" not in fused_names(model, right)
    finally:
        for module in mlps:
            del module.forward


def test_mixed_dtypes_are_not_fused():
    model = tiny_model("llama")
    model.model.norm.to(torch.float64)
    assert FusedStep(model, like(right)).count == 0


def test_a_model_on_the_cpu_is_not_fused():
    assert fused_step(tiny_model("llama")) is None
