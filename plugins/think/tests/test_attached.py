"""ThinK on whole models: tokens and logits against a full cache with zero-filled keys."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.testing_models import FAMILIES, left_padded, tiny_model

from . import oracle

NAME = "think_oracle"
OPTIONS = {"ratio": 0.5, "window": 6, "recent": 5, "block": 4}


class FullCacheOracle:
    """Attend over the full cache with the keys' dropped channels at zero, once the prompt is over.

    One sequence at a time; registered with transformers as an attention function.
    """

    def __init__(self):
        self.channels, self.prompt = {}, 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer, n, keys = module.layer_idx, key.shape[2], key[0]
        group = query.shape[1] // key.shape[1]
        if layer not in self.channels:
            self.prompt = n
            norms = oracle.frobenius(query[0, :, -OPTIONS["window"] :], keys)
            self.channels[layer] = norms.topk(keys.shape[-1] // 2).indices.sort().values
        else:
            start = oracle.whole_from(self.prompt, n, OPTIONS["recent"], OPTIONS["block"])
            keys = oracle.zero_filled(keys, self.channels[layer], start)
        keys = keys.double().repeat_interleave(group, dim=0)
        scores = query[0].double() @ keys.transpose(1, 2) * scaling
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(n - query.shape[2] + 1)
        a = scores.masked_fill(future, float("-inf")).softmax(-1)
        output = a @ value[0].double().repeat_interleave(group, dim=0)
        return output.to(query.dtype).transpose(0, 1)[None].contiguous(), None


def generate(model, batch, new, **settings):
    """Return logits [B, new, V] and tokens [B, new] of a greedy run."""
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    output = model.generate(
        **batch, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1), output.sequences[:, batch["input_ids"].shape[1] :]


def run_oracle(model, row, new):
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, FullCacheOracle())
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        return generate(model, {"input_ids": row[None]}, new)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 17])
def test_a_padded_batch_is_the_full_cache_with_zero_filled_keys(family, chunk):
    model, new = tiny_model(family, num_hidden_layers=2), 12
    batch, rows = left_padded((40, 4, 21))
    settings = {"prefill_chunk_size": chunk} if chunk else {}
    with kvdock.attach(model, "think", **OPTIONS) as dock:
        logits, tokens = generate(model, batch, new, **settings)
        report = dock.report()
        for row, found in enumerate(dock.kept_positions(0)[:, 0].tolist()):
            assert [p for p in found if p >= 0] == list(range(len(rows[row]) + new - 1))
    for row, ids in enumerate(rows):
        wanted_logits, wanted_tokens = run_oracle(model, ids, new)
        assert torch.equal(tokens[row], wanted_tokens[0])
        assert torch.allclose(logits[row], wanted_logits[0], rtol=1e-4, atol=1e-4)
    # layers, rows, heads; 40 slots of 8 + 16 channels and 9 of the other 8, in float32
    assert report.bytes_after_prefill == 2 * 3 * 2 * (40 * (8 + 16) + 9 * 8) * 4
    assert report.bytes_held == report.bytes_predicted


def test_the_zeros_of_the_oracle_matter():
    """Decode logits differ from the plain model's, so the test above can fail."""
    model = tiny_model("llama", num_hidden_layers=2)
    _, (row,) = left_padded((60,))
    plain = generate(model, {"input_ids": row[None]}, 4)[0]
    found = run_oracle(model, row, 4)[0]
    assert torch.allclose(found[:, 0], plain[:, 0], atol=1e-4)
    assert (found[:, 1] - plain[:, 1]).abs().max() > 0.01


def test_ratio_zero_is_the_plain_model_bit_for_bit():
    model = tiny_model("llama")
    batch, _ = left_padded((50, 50))
    plain = generate(model, batch, 8)
    with kvdock.attach(model, "think", ratio=0.0) as dock:
        found = generate(model, batch, 8)
        assert dock.plan.storage_policy is None
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


def test_a_second_turn_and_a_reordered_batch_run_like_single_rows():
    model = tiny_model("llama")
    _, rows = left_padded((30, 30))
    first, more = torch.stack(rows), torch.randint(3, 160, (2, 9))

    def turns(one, other, order):
        cache = dock.new_cache()
        with torch.no_grad():
            model(input_ids=one, past_key_values=cache)
            cache.reorder_cache(torch.tensor(order))
            logits = model(input_ids=other, past_key_values=cache).logits
            return torch.cat(
                [logits, model(input_ids=other[:, :1], past_key_values=cache).logits], dim=1
            )

    with kvdock.attach(model, "think", **OPTIONS) as dock:
        together = turns(first, more, [1, 0])
        for row in range(2):
            alone = turns(first[1 - row : 2 - row], more[row : row + 1], [0])
            assert torch.allclose(together[row], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param("snapkv+think", marks=pytest.mark.beside("snapkv")),
        pytest.param("think+kivi", marks=pytest.mark.beside("kivi")),
    ],
)
def test_compositions_report_what_they_hold(methods):
    model = tiny_model("llama", head_dim=32)
    batch, _ = left_padded((90, 61))
    own = {f"think.{name}": value for name, value in OPTIONS.items()}
    if "kivi" in methods:
        own |= {"group_size": 32, "residual_length": 32}
    else:
        own |= {"snapkv.window": 6, "budget": 40}
    with kvdock.attach(model, methods, **own) as dock:
        generate(model, batch, 8)
        report = dock.report()
    assert report.bytes_held == report.bytes_predicted < report.bytes_full
    if methods == "snapkv+think":
        assert report.bytes_after_prefill == 3 * 2 * 2 * (40 * (16 + 32) + 9 * 16) * 4
