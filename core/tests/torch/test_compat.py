"""What kvdock assumes of transformers, checked on the installed files: fails early on a change."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock import compat
from kvdock.errors import UnsupportedError
from kvdock.testing_models import FAMILIES, tiny_model

HAND_OVER = re.compile(
    r"key_states, value_states = (?:past_key_values?|cache)\.update\("
    r"\s*key_states, value_states,[^)]*\)\s*"
    r"attention_interface\b.*?"
    r"attention_interface\(\s*self,\s*query_states,\s*key_states,\s*value_states,\s*attention_mask",
    re.DOTALL,
)


def attention_source(model):
    found = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    return inspect.getsource(type(found).forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_hands_straight_to_attention(family):
    """Nothing may look at what `update` returns before the attention function does."""
    source = attention_source(tiny_model(family))
    match = HAND_OVER.search(source)
    assert match, f"{family} no longer passes the cache's answer on untouched:\n{source}"
    between = match[0].split("update(", 1)[1].split(")", 1)[1].rsplit("attention_interface(", 1)[0]
    assert "key_states" not in between and "value_states" not in between


def recorded(model, batch, **kwargs):
    """Return the keyword arguments the attention and the mask function were called with."""
    calls = {}

    def attention(module, query, key, value, attention_mask, **given):
        calls.setdefault("attention", given)
        calls["shapes"] = query.shape, key.shape, value.shape
        return query.transpose(1, 2).contiguous(), None

    def mask(**given):
        calls.setdefault("mask", given)
        return sdpa_mask(**given)

    AttentionInterface.register("probe", attention)
    AttentionMaskInterface.register("probe", mask)
    try:
        model.set_attn_implementation("probe")
        with torch.no_grad():
            model(**batch, past_key_values=DynamicCache(config=model.config), **kwargs)
    finally:
        AttentionInterface._global_mapping.pop("probe")
        AttentionMaskInterface._global_mapping.pop("probe")
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_of_both_functions(family, batch):
    calls = recorded(tiny_model(family), batch)
    query, key, value = calls["shapes"]
    assert query == (3, 4, 97, 16) and key == value == (3, 2, 97, 16), "heads are not repeated"
    attention = calls["attention"]
    assert {"scaling", "dropout"} <= attention.keys() and attention["scaling"] == 16**-0.5
    known = {"scaling", "dropout", "position_ids", "use_cache", "sliding_window"}
    assert attention.keys() <= known | {"cache_position", "output_attentions"}, attention.keys()
    mask = calls["mask"]
    needed = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "attention_mask"}
    assert needed <= mask.keys()
    assert (mask["batch_size"], mask["q_length"], mask["kv_length"]) == (3, 97, 97)
    assert mask["attention_mask"].shape == (3, 97) and mask["attention_mask"].dtype == torch.bool
    assert (int(mask["q_offset"]), int(mask["kv_offset"])) == (0, 0)


def test_every_feature_is_there():
    compat.probe()


@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [
        (compat.AttentionInterface, "_global_mapping", "AttentionInterface._global_mapping"),
        (compat.AttentionMaskInterface, "register", "AttentionMaskInterface.register"),
        (compat.PreTrainedModel, "set_attn_implementation", "PreTrainedModel.set_attn"),
    ],
)
def test_a_missing_feature_is_named(monkeypatch, model, policies, owner, name, text):
    for cls in owner.__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(UnsupportedError, match=f"lacks .*{text}.*transformers>=5.4,<6"):
        kvdock.attach(model, [policies.Votes()])


def test_an_older_signature_is_named(monkeypatch, model, policies):
    monkeypatch.setattr(compat.DynamicLayer, "get_mask_sizes", lambda self, cache_position: (0, 0))
    with pytest.raises(UnsupportedError, match=r"lacks CacheLayerMixin\.get_mask_sizes"):
        kvdock.attach(model, [policies.Votes()])


def test_a_missing_parameter_is_named(monkeypatch, model, policies):
    monkeypatch.setattr(compat.GenerationMixin, "generate", lambda self, inputs: None)
    with pytest.raises(
        UnsupportedError, match=r"lacks GenerationMixin\.generate\(logits_processor"
    ):
        kvdock.attach(model, [policies.Votes()])


def test_a_class_that_cannot_be_imported_is_named():
    program = (
        "import transformers.cache_utils as c; del c.DynamicSlidingWindowLayer\n"
        "from kvdock.errors import UnsupportedError\n"
        "try: import kvdock.compat\n"
        "except UnsupportedError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "DynamicSlidingWindowLayer" in found.stdout and "transformers>=5.4,<6" in found.stdout


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_docked_generate_uses_no_deprecated_name(model, policies, row):
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        model.generate(**row, max_new_tokens=3)
        model.generate(**row, max_new_tokens=3, **{compat.CACHE: dock.new_cache()})
        assert dock.report().bytes_held


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_cache_is_taken_by_either_name(model, policies, row, name):
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        cache = dock.new_cache()
        model.generate(**row, max_new_tokens=3, **{name: cache})
        assert cache.get_seq_length() == row["input_ids"].shape[1] + 2


def test_two_caches_are_refused(model, policies, row):
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        both = {name: dock.new_cache() for name in compat.CACHE_NAMES}
        with pytest.raises(UnsupportedError, match="past_key_values and cache are both given"):
            model.generate(**row, **both)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (compat.CACHE, "cache of the dock|dock.new_cache"),
        ("logits_processor", "never announced.*not returned"),
    ],
)
def test_a_generate_that_goes_past_kvdock_is_refused(
    monkeypatch, model, policies, row, lost, reason
):
    """A version that drops what it is given must not return an uncompressed result."""
    original = model.generate

    def newer(inputs=None, **kwargs):
        return original(inputs, **{name: kwargs[name] for name in kwargs if name != lost})

    model.__dict__["generate"] = newer
    with (
        kvdock.attach(model, [policies.Votes()], budget=48),
        pytest.raises(UnsupportedError, match=reason),
    ):
        model.generate(**row, max_new_tokens=2)


def test_two_models_share_the_registration(policies, row, generate):
    left, right = tiny_model("llama"), tiny_model("qwen3")
    outer = kvdock.attach(left, [policies.Votes()], budget=48)
    with kvdock.attach(right, [policies.Ring()], budget=48):
        generate(right, row, 2)
    assert "kvdock" in AttentionInterface(), "the first model still needs it"
    generate(left, row, 2)
    outer.detach()
    assert "kvdock" not in AttentionInterface() and "kvdock" not in AttentionMaskInterface()
