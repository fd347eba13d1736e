"""FlexPrefill on whole models: against attention under the naive selection's masks."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.errors import CompositionError, OptionError, UnsupportedError
from kvdock.testing_models import left_padded, tiny_model

from . import oracle

NAME = "flexprefill_oracle"
BLOCK = 16
OPTIONS = {"block": BLOCK, "min_budget": 16, "gamma": 0.6, "tau": 0.2, "dense_below": 40}
NAIVE = {"exact": oracle.exact, "compat": oracle.compat}


class MaskedAttention:
    """Attend under the naive selection's mask; one sequence, registered with transformers."""

    def __init__(self, mode):
        self.mode, self.density = mode, []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        q, k, v = (x[0].double() for x in (query, key, value))
        group, n, off = len(q) // len(k), k.shape[1], k.shape[1] - q.shape[1]
        position = torch.arange(n)
        output = []
        for h in range(len(q)):
            visible = position <= position[off:, None]
            if n >= OPTIONS["dense_below"] and q.shape[1] > BLOCK:
                mask, _ = NAIVE[self.mode](
                    q[h].numpy(), k[h // group].numpy(), scaling, block=BLOCK,
                    gamma=OPTIONS["gamma"], tau=OPTIONS["tau"], least=OPTIONS["min_budget"],
                )  # fmt: skip
                rows = torch.from_numpy(mask)[position[off:] // BLOCK - off // BLOCK]
                visible = visible & rows[:, position // BLOCK]
                self.density.append(mask.mean())
            scores = (q[h] @ k[h // group].T * scaling).masked_fill(~visible, float("-inf"))
            output.append(scores.softmax(-1) @ v[h // group])
        return torch.stack(output, 1)[None].to(query.dtype), None


def oracle_logits(model, row, mode):
    """Return the prompt's logits [n, V] under the naive masks, and their mean density."""
    spy, before = MaskedAttention(mode), model.config._attn_implementation
    AttentionInterface.register(NAME, spy)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        logits = model(row[None]).logits[0]
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
    return logits, spy.density


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "glm4", "mistral"])
@torch.no_grad()
def test_a_padded_batch_is_attention_under_the_naive_masks(family, mode):
    model = tiny_model(family, num_hidden_layers=2)
    batch, rows = left_padded((150, 39, 97))
    with kvdock.attach(model, "flexprefill", mode=mode, **OPTIONS) as dock:
        found = model(**batch, past_key_values=dock.new_cache()).logits
    for index, row in enumerate(rows):
        wanted, density = oracle_logits(model, row, mode)
        assert bool(density) == (len(row) != 39)  # the short row is read densely
        assert torch.allclose(found[index, -len(row) :], wanted, rtol=1e-3, atol=1e-3)
    plain = model(**batch).logits
    assert (found[0] - plain[0]).abs().max() > 0.01  # something was left out


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm4", "mistral"])
def test_gamma_of_one_is_the_plain_model_in_chunks_too(family):
    model, (batch, _) = tiny_model(family), left_padded((120, 77))
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**batch, **settings)
    with kvdock.attach(model, "flexprefill", **{**OPTIONS, "gamma": 1.0}):
        assert torch.equal(model.generate(**batch, **settings), plain)
        assert torch.equal(model.generate(**batch, prefill_chunk_size=50, **settings), plain)


def test_almost_all_of_the_mass_gives_almost_the_plain_logits():
    model, (batch, _) = tiny_model("llama"), left_padded((150,))
    with torch.no_grad():
        plain = model(**batch).logits
        apart = []
        for gamma in (0.4, 0.8, 0.99):
            with kvdock.attach(model, "flexprefill", **{**OPTIONS, "gamma": gamma}) as dock:
                found = model(**batch, past_key_values=dock.new_cache()).logits
            apart.append((found - plain).norm() / plain.norm())
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.05


@pytest.mark.beside("snapkv")
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_composed_with_snapkv_a_batch_is_its_rows_and_memory_is_snapkvs(family):
    model, (batch, rows) = tiny_model(family), left_padded((150, 60, 97))
    settings = {"max_new_tokens": 6, "do_sample": False}
    snapkv = {"budget": 32, "window": 8}
    with kvdock.attach(model, "flexprefill+snapkv", **snapkv, **OPTIONS) as dock:
        together = model.generate(**batch, **settings)[:, 150:]
        held = dock.report().bytes_after_prefill
        for index, row in enumerate(rows):
            alone = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
            single = model.generate(**alone, **settings)[:, len(row) :]
            assert torch.equal(single[0], together[index])
    assert held == 3 * 3 * 2 * 32 * (16 + 16) * 4
    with kvdock.attach(model, "snapkv", **snapkv) as dock:
        model.generate(**batch, **settings)
        assert dock.report().bytes_after_prefill == held


def test_the_default_options_are_the_papers():
    with kvdock.attach(tiny_model("llama"), "FlexPrefill") as dock:
        options = dock.plan.attention_policy.options
    assert (options.gamma, options.tau, options.min_budget) == (0.95, 0.1, 1024)
    assert (options.max_budget, options.block, options.mode) == (None, 128, "exact")


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (OptionError, {"gamma": 1.5}, "gamma"),
        (OptionError, {"min_budget": 64, "max_budget": 32}, "min_budget.*max_budget"),
        (OptionError, {"gama": 0.9}, "gamma"),
        (CompositionError, {"budget": 2048}, "keeps every token"),
        (UnsupportedError, {"backend": "flash-attn-4", "block": 16}, "flash-attn-4"),
        (UnsupportedError, {"backend": "nonesuch"}, "nonesuch"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(error, settings, words):
    model = tiny_model("llama")
    with pytest.raises(error, match=words):
        kvdock.attach(model, "flexprefill", **settings)
    assert model.config._attn_implementation != "kvdock"
