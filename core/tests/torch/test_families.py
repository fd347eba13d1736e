"""Models with layers kvdock leaves alone, soft-capping, sinks or no positions: plain = docked."""

import pytest
import torch
from transformers import CONFIG_MAPPING

import kvdock
from kvdock.testing_models import left_padded, tiny_model

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma2": {"sliding_window": 16, "layer_types": MIXED, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED, "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "sliding_window": 16,
        "layer_types": MIXED,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attn_implementation": "eager",
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "ministral": {"sliding_window": 16, "layer_types": MIXED},
}
EAGER = {"gemma2", "gpt_oss"}
"""Where sdpa has no soft-capping or no sinks, the plain model runs its eager attention."""


@pytest.fixture(params=[name for name in FAMILIES if name in CONFIG_MAPPING])
def family(request):
    return request.param


def make(family):
    settings = dict(FAMILIES[family])
    settings["attn_implementation"] = "eager" if family in EAGER else "sdpa"
    model = tiny_model(family, **settings)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.uniform_(parameter, -1.0, 3.0)
    return model


def single(row):
    return {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}


def test_a_generous_budget_changes_nothing(family, policies, generate):
    model, (batch, rows) = make(family), left_padded((60, 33))
    plain = generate(model, batch, 5)
    with kvdock.attach(model, [policies.Votes()], budget=4096) as dock:
        assert generate(model, batch, 5) == plain
        assert generate(model, single(rows[1]), 5) == plain[1:]
        assert generate(model, batch, 5, prefill_chunk_size=25) == plain
        dock.report()


def test_rows_do_not_depend_on_padding(family, policies, generate):
    model, (batch, rows) = make(family), left_padded((60, 33))
    with kvdock.attach(model, [policies.Ring()], budget=30) as dock:
        together = generate(model, batch, 5)
        dock.report()
        assert together == [generate(model, single(row), 5)[0] for row in rows]


def test_only_full_layers_are_managed(family, policies, row, generate):
    model = make(family)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    with kvdock.attach(model, [policies.Votes()], budget=40) as dock:
        generate(model, row, 4)
        full = [index for index, kind in enumerate(types) if kind == "full_attention"]
        assert [layer.layer for layer in dock.report().layers] == full
        for index, layer in enumerate(dock.cache.layers):
            assert layer.get_seq_length() == 97 + 3
            if index not in full:
                assert layer.keys.shape[2] <= 16


def test_prefill_logits_are_the_plain_models(family, policies, row):
    model = make(family)
    with torch.no_grad():
        plain = model(**row).logits
        with kvdock.attach(model, [policies.Votes()], budget=40) as dock:
            docked = model(**row, past_key_values=dock.new_cache()).logits
    torch.testing.assert_close(docked, plain, atol=1e-4, rtol=1e-4)
