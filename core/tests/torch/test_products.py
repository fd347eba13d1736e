"""Products of few rows with weights where they lie: the kernels against float64, and their gate."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvdock
from kvdock import products
from kvdock.fused import FusedStep
from kvdock.products import Products, plain, products_of
from kvdock.testing import tiny_model


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    program = [sys.executable, str(Path(__file__).with_name("product_runs.py"))]
    interpret = [] if torch.cuda.is_available() else ["--interpret"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*program, *interpret], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.interpret
def test_products_round_once(found):
    runs = found["runs"]
    assert len(runs) >= 50
    # half a unit for the one rounding; float32 has no wider sum, a gate rounds three times
    limits = {"products": 0.51, "cores": 0.51, "gated": 2.0, "halves": 2.0}
    wrong = {}
    for name, error in runs.items():
        limit = 8.0 if name.startswith("float32") else limits[name.split()[-1]]
        if error > limit:
            wrong[name] = error
    assert wrong == {}


@pytest.mark.interpret
def test_results_never_vary(found):
    assert found["same"]


def stand_in(calls, scale=1.0):
    """Return kernels in plain torch that count their calls."""

    def several(states, weights, biases):
        calls.append(len(weights))
        return [F.linear(states, w, b) * scale for w, b in zip(weights, biases, strict=True)]

    def opened(states, weights, biases):
        calls.append("gated")
        made = [F.linear(states, w, b) for w, b in zip(weights, biases, strict=True)]
        return gated(*made)

    def gated(gate, up):
        return F.silu(gate) * up

    def add_rms_norm(left, right, weight, eps):
        return left + right, norm(left + right, weight, eps)

    def norm(states, weight, eps):
        wide = states.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + eps)).to(states.dtype)

    def rotate(query, key, cos, sin):
        def turned(x):
            low, high = x.chunk(2, -1)
            return (x * cos[:, :, None] + torch.cat([-high, low], -1) * sin[:, :, None]).transpose(
                1, 2
            )

        return turned(query), turned(key)

    step = SimpleNamespace(gated=gated, rms_norm=norm, add_rms_norm=add_rms_norm, rotate=rotate)
    return SimpleNamespace(products=several, gated_product=opened), step


def clock(*times):
    """Return a clock that says these times in turn, again and again."""
    state = iter(times * 100)

    def measured(run):
        run()
        return next(state)

    return measured


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(products, "_verdicts", {})


def three(dtype=torch.float16, bias=False):
    return [nn.Linear(48, n, bias=bias, dtype=dtype) for n in (32, 8, 8)]


def made(layers, calls, *, times=(2.0, 1.0), scale=1.0, rows=2):
    group = Products(stand_in(calls, scale), "cpu", clock(*times))
    group.add(layers)
    group.prepare(rows)
    calls.clear()
    return group


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_become_one_product(bias):
    calls, layers = [], three(bias=bias)
    group = made(layers, calls)
    states = torch.randn(2, 1, 48, dtype=torch.float16)
    found = group(layers, states)
    assert calls == [3]
    assert all(torch.equal(x, layer(states)) for x, layer in zip(found, layers, strict=True))
    group(layers, states[:1])
    assert calls == [3], "one row was not tried"


@torch.no_grad()
def test_only_what_is_faster_and_right_is_taken(caplog):
    caplog.set_level(logging.INFO, "kvdock")
    states, layers = torch.randn(2, 1, 48, dtype=torch.float16), three()
    for more, line in (
        ({"times": (1.0, 0.99)}, "takes 0.990 ms where the layers take 1.000"),
        ({"scale": 1.05}, "units in the last place"),
        ({"rows": 9}, ""),
    ):
        products._verdicts.clear()
        calls = []
        made(layers, calls, **more)(layers, states)
        assert calls == []
        assert line in caplog.text


@torch.no_grad()
def test_layers_that_are_more_than_a_weight_run_themselves():
    seen, calls, layers = [], [], three()
    states = torch.randn(2, 1, 48, dtype=torch.float16)
    group = made(layers, calls)
    handle = layers[1].register_forward_hook(lambda *given: seen.append(1))
    group(layers, states)
    assert (calls, seen) == ([], [1])
    handle.remove()
    layers[2].forward = lambda x: x
    group(layers, states)
    del layers[2].forward
    assert calls == []
    group(layers, states)
    assert calls == [3], "the hook and the forward are gone"

    class Adapted(nn.Linear):
        pass

    class Packed(torch.Tensor):
        pass

    packed = three()[0]
    packed.weight = nn.Parameter(packed.weight.data.as_subclass(Packed))
    assert not plain(Adapted(4, 4)) and not plain(packed) and plain(three()[0])


def test_float32_and_mixed_biases_run_themselves():
    for layers in (three(torch.float32), [*three()[:2], *three(bias=True)[2:]]):
        calls = []
        assert made(layers, calls)._taken == set()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "glm4"])
def test_a_model_runs_by_products_and_is_left_as_it_was(family):
    pytest.importorskip("kvdock_streamingllm")
    model, calls = tiny_model(family).half(), []
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    kernels = stand_in(calls)
    states = torch.randn(2, 1, model.config.hidden_size, dtype=torch.float16)
    layer = model.model.layers[0]
    with kvdock.attach(model, "streamingllm", budget=32):
        group = Products(kernels, "cpu", clock(2.0, 1.0))
        step = FusedStep(model, kernels[1], group)
        wanted = layer.mlp(states)
        group.prepare(2)
        calls.clear()
        with step.active():
            found = layer.mlp(states)
    assert calls == ["gated", 1]
    assert (found - wanted).abs().max() <= 8 * torch.finfo(torch.float16).eps * wanted.abs().max()
    attends = {"llama", "qwen2", "qwen3", "mistral"}
    assert (3 in {len(kind.shapes) for kind in group._taken}) == (family in attends)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [m for m in model.modules() if "forward" in m.__dict__] == []


def test_layers_stay_themselves_on_request_and_off_gpus(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("KVDOCK_PRODUCTS", raising=False)
    assert products_of(torch.device("cpu"))._kernels is None
    assert products_of(torch.device("cuda"))._kernels is not None
    monkeypatch.setenv("KVDOCK_PRODUCTS", "0")
    assert products_of(torch.device("cuda"))._kernels is None
