"""SnapKV on whole models: kept positions and logits against a full cache with a mask."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.errors import BudgetError, OptionError
from kvdock.testing_models import left_padded, tiny_model

from . import oracle

NAME = "snapkv_oracle"
OPTIONS = {"window": 6, "kernel": 5, "pooling": "max"}


class FullCacheOracle:
    """Attend over the full cache and hide, after the prompt, what naive SnapKV drops.

    One sequence at a time; registered with transformers as an attention function.
    """

    def __init__(self, slots):
        self.slots = slots
        self.kept, self.sure = {}, True

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer, n = module.layer_idx, key.shape[2]
        a = oracle.probabilities(query[0], key[0], scaling=scaling)
        if layer not in self.kept:
            self.prompt = n
            self.kept[layer], sure = oracle.select(
                a, kv_heads=key.shape[1], slots=self.slots, **OPTIONS
            )
            self.sure = self.sure and sure
        else:
            a = a * self.visible(layer, n).repeat_interleave(a.shape[0] // key.shape[1], dim=0)
            a = a / a.sum(-1, keepdim=True)
        values = value[0].double().repeat_interleave(a.shape[0] // key.shape[1], dim=0)
        return (a @ values).to(query.dtype).transpose(0, 1)[None].contiguous(), None

    def visible(self, layer, n):
        """Return 1 for the keys a later query sees, [K, 1, N]: the kept ones and new ones."""
        seen = torch.zeros(len(self.kept[layer]), 1, n, dtype=torch.float64)
        seen[..., self.prompt :] = 1
        for head, positions in enumerate(self.kept[layer]):
            seen[head, 0, positions] = 1
        return seen


def run_oracle(model, row, slots, new):
    """Return (oracle, logits [new, V], tokens [new]) of one greedy run without padding."""
    spy = FullCacheOracle(slots)
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, spy)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        output = generate(model, {"input_ids": row[None]}, new)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
    return spy, *output


def generate(model, batch, new, **settings):
    """Return the logits and tokens of a greedy run; [new, V] and [new] for a single row."""
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    output = model.generate(
        **batch, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    logits = torch.stack(output.logits, dim=1)
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    return (logits[0], tokens[0]) if len(tokens) == 1 else (logits, tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "glm4"])
@pytest.mark.parametrize("chunk", [None, 17])
def test_a_padded_batch_is_the_full_cache_with_the_dropped_keys_hidden(family, chunk):
    model, slots, new = tiny_model(family, num_hidden_layers=2), 20, 8
    batch, rows = left_padded((60, 20, 41))
    runs = [run_oracle(model, row, slots, new) for row in rows]
    assert all(run[0].sure for run in runs)
    settings = {"prefill_chunk_size": chunk} if chunk else {}
    with kvdock.attach(model, "snapkv", budget=slots, **OPTIONS) as dock:
        logits, tokens = generate(model, batch, new, **settings)
        report = dock.report()
        for layer in range(2):
            for row, found in enumerate(dock.kept_positions(layer).tolist()):
                n, spy = len(rows[row]), runs[row][0]
                generated = range(n, n + new - 1)
                assert found == [[*head, *generated] for head in spy.kept[layer]], (layer, row)
    for row, (_, wanted_logits, wanted_tokens) in enumerate(runs):
        assert torch.equal(tokens[row], wanted_tokens)
        assert torch.allclose(logits[row], wanted_logits, rtol=1e-4, atol=1e-4)
    assert report.bytes_after_prefill == 2 * 3 * 2 * slots * (16 + 16) * 4


def test_the_mask_of_the_oracle_matters():
    """Without hiding anything the decode logits are others, so the test above can fail."""
    model = tiny_model("llama", num_hidden_layers=2)
    _, (row, *_) = left_padded((60,))
    hidden, full = (run_oracle(model, row, slots, 4)[1] for slots in (20, 60))
    assert torch.equal(hidden[0], full[0])  # the prompt itself is never changed
    assert (hidden[1] - full[1]).abs().max() > 0.01


def test_a_padded_batch_keeps_the_budget_in_bytes_over_all_rows():
    model = tiny_model("llama")
    batch, _ = left_padded((90, 64))
    per_slot = 3 * 2 * 2 * (16 + 16) * 4  # layers, rows, heads, key and value, float32
    with kvdock.attach(model, "snapkv", budget=f"{30 * per_slot}B", **OPTIONS) as dock:
        generate(model, batch, 2)
        assert dock.report().bytes_after_prefill == 30 * per_slot


def test_the_default_budget_and_options_are_the_authors():
    with kvdock.attach(tiny_model("llama"), "SnapKV") as dock:
        options = dock.plan.cache_policy.options
        assert str(dock.plan.budget) == "2048tok"
    assert (options.window, options.kernel, options.pooling) == (32, 7, "max")


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (OptionError, {"kernel": 4}, "kernel.*odd"),
        (OptionError, {"pooling": "mean"}, "pooling.*max.*avg"),
        (OptionError, {"windows": 4}, "window"),
        (BudgetError, {"budget": 32}, "window=32"),
        (BudgetError, {"budget": 8, "window": 9}, "window=9"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(error, settings, words):
    model = tiny_model("llama")
    with pytest.raises(error, match=words):
        kvdock.attach(model, "snapkv", **settings)
    assert model.config._attn_implementation != "kvdock"
