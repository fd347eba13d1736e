"""Dispersion, shift and temperatures, on hand-made attention."""

import math
from types import SimpleNamespace

import pytest
import torch

from kvdock.kernels import window_scores
from kvdock.policy import AttentionParams
from kvdock.testing_layers import random_states
from kvdock_cakekv.options import CakeKVOptions
from kvdock_cakekv.policy import CakeKVPolicy
from kvdock_cakekv.scores import preference, window_statistics
from kvdock_cakekv.temperatures import DEFAULT, fitted

from . import oracle


def statistics(q, k, window, gamma=200.0):
    scaling = AttentionParams(k.shape[-1] ** -0.5)
    indicator, layer = window_statistics(q[:, :, -window:], k, scaling, gamma)
    return indicator, layer.tolist()


def test_uniform_attention_disperses_by_the_logarithm_of_its_keys():
    q, k, _ = random_states(0, 1, 1, 1, 60, 64)
    _, (dispersion, _) = statistics(q, torch.zeros_like(k), 4)
    # query r sees 57 + r keys, of which the prefix has 56
    assert dispersion == pytest.approx(sum(56 / n * math.log(n) for n in range(57, 61)), rel=1e-5)


def test_queries_that_see_alike_do_not_shift():
    q, k, _ = random_states(1, 1, 2, 2, 40, 64)
    k[:, :, -5:] = -1e9 * q[:, ::2, -1:]  # the window's own keys, which rows see differently
    q[:, :, -5:] = q[:, :, -1:]
    q, k = q.abs(), torch.cat([k[:, :, :-5].abs(), torch.full_like(k[:, :, -5:], -1e4)], dim=2)
    _, layer = statistics(q, k, 5)
    assert layer[1] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("window", [1, 2, 9])
def test_statistics_equal_the_oracle(window):
    q, k, _ = random_states(2, 1, 2, 3, 70, 64)
    prefix = oracle.attention(q[0, :, -window:], k[0], 64**-0.5)[..., : 70 - window]
    indicator, (dispersion, shift) = statistics(q, k, window, 7.0)
    wanted = oracle.indicator(prefix, 2, 7.0, 1)
    assert torch.allclose(indicator[0].double(), torch.tensor(wanted).double(), rtol=1e-5)
    assert dispersion == pytest.approx(oracle.dispersion(prefix), rel=1e-5)
    assert shift == pytest.approx(oracle.variance(prefix).sum().item(), rel=1e-5)


def test_variances_of_long_prompts_do_not_vanish():
    """In half precision they do: every probability is about 1/n."""
    q, k, _ = random_states(3, 1, 1, 4, 8192, 64)
    prefix = oracle.attention(q[0, :, -32:], k[0], 64**-0.5)[..., :-32]
    indicator, (_, shift) = statistics(q, k, 32)
    assert shift == pytest.approx(oracle.variance(prefix).sum().item(), rel=1e-4)
    wanted = prefix.mean(dim=1) + 200 * oracle.variance(prefix)
    assert torch.allclose(indicator[0, 0].double(), wanted.mean(dim=0), rtol=1e-3)


@pytest.mark.parametrize("block_bytes", [1, 30_000])
def test_statistics_do_not_depend_on_the_block_size(block_bytes, monkeypatch):
    q, k, _ = random_states(4, 1, 4, 2, 120, 64)
    whole = statistics(q, k, 16)
    monkeypatch.setattr(window_scores, "BLOCK_BYTES", block_bytes)
    blocks = statistics(q, k, 16)
    assert torch.allclose(whole[0], blocks[0], rtol=1e-5)
    assert whole[1] == pytest.approx(blocks[1], rel=1e-5)


def test_preferences():
    assert preference(torch.tensor([8.0, 0.25]), 1.0, 1.0) == pytest.approx(2.0)
    assert preference(torch.tensor([8.0, 0.25]), 3.0, 0.5) == pytest.approx(2 * 0.25**2)
    assert preference(torch.tensor([8.0, 0.25]), 1e9, 1e9) == pytest.approx(1.0)


@pytest.mark.parametrize("nothing", [0.0, -1e-9, float("nan")])
def test_a_preference_of_nothing_is_tiny_and_finite(nothing):
    lone = preference(torch.tensor([3.0, nothing]), 1.0, 1.0)
    assert 0 < lone < 1e-200
    assert lone == preference(torch.tensor([5.0, nothing]), 0.5, 2.0)


def model(model_type, layers, hidden, kv_heads):
    return SimpleNamespace(
        model_type=model_type, num_hidden_layers=layers, hidden_size=hidden,
        num_key_value_heads=kv_heads,
    )  # fmt: skip


LLAMA, QWEN = model("llama", 32, 4096, 8), model("qwen2", 28, 3584, 4)


@pytest.mark.parametrize(
    ("config", "slots", "wanted"),
    [
        (LLAMA, 1024, (1.6, 0.4)), (LLAMA, 2048, (1.6, 0.4)), (LLAMA, 128, (1.6, 0.6)),
        (LLAMA, 200, (1.6, 0.6)), (model("llama", 32, 4096, 32), 1024, (1.9, 1.8)),
        (model("llama", 40, 5120, 40), 64, (1.8, 2.0)), (QWEN, 1024, (1.5, 0.6)),
        (model("mistral", 32, 4096, 8), 1024, (0.8, 0.5)),
        (model("qwen3", 28, 3584, 4), 1024, DEFAULT), (model("llama", 16, 2048, 8), 1024, DEFAULT),
        (None, 1024, DEFAULT),
    ],
)  # fmt: skip
def test_temperatures_of_a_model(config, slots, wanted):
    assert fitted(config, slots) == wanted


def test_options_override_the_table():
    policy = CakeKVPolicy(CakeKVOptions(tau2=3.0))
    policy.bind(SimpleNamespace(config=LLAMA, shard=None))
    assert policy.temperatures(1024) == (1.6, 3.0)
