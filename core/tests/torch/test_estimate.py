"""Estimates against the bytes that are really allocated."""

import pytest
import torch

import kvdock
from kvdock.compose import compose
from kvdock.errors import KVDockError, UnsupportedError
from kvdock.estimate import Estimate, bind
from kvdock.footprint import of_model, read_model
from kvdock.registry import default_host
from kvdock.testing import generate
from kvdock.testing_models import FAMILIES, tiny_model

TOKENS, BUDGET = 300, 48


def prompts(rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 160, (rows, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def held(model, methods, rows, budget):
    with kvdock.attach(model, methods, budget=budget) as dock:
        generate(model, prompts(rows), max_new_tokens=1)
        return dock.report().bytes_after_prefill


def budget_of(method, budget=BUDGET):
    records = [default_host().load(id) for id in method.split("+")]
    return budget if any(record.default_budget for record in records) else None


def agrees(model, methods, rows=1, budget=BUDGET):
    budget = budget_of(methods, budget)
    composition = compose(default_host(), methods, budget, {})
    footprint = of_model(model)
    bind(footprint, composition)
    found, really = (
        Estimate(footprint, composition, rows).cache(TOKENS),
        held(model, methods, rows, budget),
    )
    assert found == pytest.approx(really, rel=0.02)
    return found


COMPOSED = [
    names
    for names in ("snapkv+kivi", "snapkv+think", "think+kivi")
    if set(names.split("+")) <= set(kvdock.available())
]


@pytest.mark.parametrize("methods", [*kvdock.available(), *COMPOSED])
def test_every_installed_method(methods):
    model = tiny_model("llama", head_dim=32)
    bytes_ = agrees(model, methods, rows=2)
    plain = Estimate(of_model(model), None, 2).cache(TOKENS)
    evicts = budget_of(methods) is not None
    assert bytes_ <= plain
    assert (bytes_ < plain / 2) or not evicts or "l2compress" in methods


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_the_plain_cache_and_its_weights(family):
    model = tiny_model(family)
    footprint = of_model(model)
    assert footprint.weights == sum(p.untyped_storage().nbytes() for p in model.parameters())
    cache = model(**prompts(1)).past_key_values
    really = sum(x.untyped_storage().nbytes() for y in cache.layers for x in (y.keys, y.values))
    assert Estimate(footprint, None).cache(TOKENS) == really


@pytest.mark.parametrize("budget", ["20%", "64KiB", 4096])
@pytest.mark.parametrize("method", [x for x in ("snapkv", "pyramidkv") if x in kvdock.available()])
def test_every_kind_of_budget(method, budget):
    agrees(tiny_model("llama"), method, rows=2, budget=budget)


def test_sliding_layers_hold_their_window():
    model = tiny_model(
        "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )  # fmt: skip
    footprint = of_model(model)
    assert (len(footprint.managed), len(footprint.others)) == (1, 2)
    cache = model(**prompts(1)).past_key_values
    really = sum(x.numel() * 4 for y in cache.layers for x in (y.keys, y.values))
    assert Estimate(footprint, None).cache(TOKENS) == really


def test_a_saved_model_is_read_without_its_weights(tmp_path):
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        read = read_model(path, "bfloat16")
        assert read.weights == of_model(model).weights / 2
        assert (read.name, read.longest, read.dtype) == (type(model).__name__, 4096, torch.bfloat16)
    assert read_model(tmp_path).dtype == torch.float32


def test_the_longest_prompt_is_the_last_that_fits():
    estimate = Estimate(of_model(tiny_model("llama", max_position_embeddings=10**6)), None)
    memory = estimate.model.weights + 50 * 2**20
    longest = estimate.longest(memory)
    assert 1000 < longest < 10**6
    assert estimate.peak(longest) <= memory < estimate.peak(longest + 1)
    assert estimate.longest(estimate.model.weights - 1) == 0
    assert estimate.longest(2**50) == 10**6


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "martian"}', '{"hidden_size": 3}'])
def test_a_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedError, match=r"no model can be made .*Expected a decoder-only"):
        read_model(tmp_path)


def test_a_path_that_is_no_model_is_refused(tmp_path):
    for path, found in ((tmp_path, "without config.json"), (tmp_path / "x", "no such folder")):
        with pytest.raises(KVDockError, match=f"{found}, expected a model .*Give the local folder"):
            read_model(path)
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(KVDockError, match="dtype is 'int8', expected one of float32"):
        read_model(tmp_path, "int8")


def test_quantised_weights_are_as_large_as_their_files(tmp_path):
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"without their \*.safetensors"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1234)
    assert read_model(tmp_path).weights == 1234
