"""XAttention on whole models, against dense attention under a mask of the chosen blocks."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.errors import OptionError, UnsupportedError
from kvdock.testing_models import left_padded, tiny_model

from . import oracle

NAME = "xattention_oracle"
FAMILIES = ["llama", "mistral", "qwen2", "glm4"]
OPTIONS = {"stride": 8, "threshold": 0.6, "mode": "exact", "block": 32, "dense_below": 100}


class MaskOracle:
    """Attend densely under the oracle's blocks; later tokens attend to everything."""

    def __init__(self, stride, threshold, block):
        self.stride, self.block = stride, block
        self.threshold = float(torch.tensor(threshold))
        self.kept = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        q, n = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        visible = torch.ones(n, n, dtype=torch.bool).tril()[n - q :].repeat(query.shape[1], 1, 1)
        size = self.block
        for head in range(query.shape[1] if q > 1 else 0):
            mass = oracle.block_mass(
                query[0, head], key[0, head // group], scaling, self.stride, size
            )
            for own, weights in enumerate(mass.tolist()):
                kept = oracle.exact_rule(weights, own, self.threshold)
                self.kept[module.layer_idx, head, own] = kept
                for block in set(range(own)) - set(kept):
                    rows = slice(own * size, own * size + size)
                    visible[head, rows, block * size : block * size + size] = False
        keys, values = (x[0].double().repeat_interleave(group, 0) for x in (key, value))
        scores = query[0].double() @ keys.transpose(1, 2) * scaling
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return (weights @ values).to(query.dtype).transpose(0, 1)[None].contiguous(), None


def generate(model, batch, new, **settings):
    """Return the logits [B, new, V] and tokens of a greedy run."""
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    output = model.generate(
        **batch, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1), output.sequences[:, batch["input_ids"].shape[1] :]


def run_oracle(model, row, new):
    """Return the oracle after a greedy run of one row, its logits and its tokens."""
    spy = MaskOracle(OPTIONS["stride"], OPTIONS["threshold"], OPTIONS["block"])
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, spy)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        return spy, *generate(model, {"input_ids": row[None]}, new)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_dense_attention_under_the_mask_of_each_row(family):
    model = tiny_model(family, num_hidden_layers=2)
    batch, rows = left_padded((190, 133))
    wanted = [run_oracle(model, row, 3) for row in rows]
    dropped = [own + 1 - len(kept) for spy, *_ in wanted for (*_, own), kept in spy.kept.items()]
    assert sum(dropped) > 10
    with kvdock.attach(model, "xattention", **OPTIONS):
        logits, tokens = generate(model, batch, 3)
    for row, (_, row_logits, row_tokens) in enumerate(wanted):
        assert torch.equal(tokens[row], row_tokens[0])
        assert torch.allclose(logits[row], row_logits[0], rtol=1e-4, atol=1e-4)


def test_the_mask_matters():
    model = tiny_model("llama", num_hidden_layers=2)
    _, (row,) = left_padded((190,))
    full, _ = generate(model, {"input_ids": row[None]}, 1)
    assert (run_oracle(model, row, 1)[1] - full).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{"threshold": 1.0}, {"dense_below": 192}])
def test_dense_settings_are_the_plain_model(changes):
    model = tiny_model("llama")
    batch, _ = left_padded((190, 101))
    with kvdock.attach(model, "xattention", **{**OPTIONS, **changes}):
        logits, tokens = generate(model, batch, 3)
    plain, plain_tokens = generate(model, batch, 3)
    assert torch.equal(tokens, plain_tokens)
    assert torch.allclose(logits, plain, rtol=1e-4, atol=1e-4)


def test_every_layer_has_its_own_lists_and_a_high_threshold_comes_close():
    model = tiny_model("llama")
    batch, _ = left_padded((190,))
    plain, _ = generate(model, batch, 1)
    apart = []
    for threshold in (0.3, 0.999):
        with kvdock.attach(model, "xattention", **{**OPTIONS, "threshold": threshold}):
            apart.append((generate(model, batch, 1)[0] - plain).abs().max().item())
    assert apart[1] < apart[0] / 4


def test_chunks_of_whole_blocks_give_what_one_forward_gives():
    model = tiny_model("llama", num_hidden_layers=2)
    batch, _ = left_padded((190,))
    settings = {**OPTIONS, "dense_below": 0}
    with kvdock.attach(model, "xattention", **settings):
        whole, tokens = generate(model, batch, 3)
    with kvdock.attach(model, "xattention", **settings):
        parts, same = generate(model, batch, 3, prefill_chunk_size=64)
    assert torch.equal(tokens, same)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.beside("snapkv")
@pytest.mark.parametrize("mode", ["exact", "compat"])
def test_snapkv_compresses_what_sparse_attention_computed(mode):
    model = tiny_model("llama")
    batch, _ = left_padded((190, 133))
    options = {f"xattention.{name}": value for name, value in OPTIONS.items()}
    options["xattention.mode"] = mode
    with kvdock.attach(model, "xattention+snapkv", budget=64, **options) as dock:
        logits, _ = generate(model, batch, 4)
        report = dock.report()
        assert dock.kept_positions(0).shape[-1] == 64 + 3
    assert report.bytes_after_prefill == 3 * 2 * 2 * 64 * (16 + 16) * 4
    with kvdock.attach(model, "xattention", **{**OPTIONS, "mode": mode}):
        alone, _ = generate(model, batch, 1)
    assert torch.allclose(logits[:, :1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (OptionError, {"stride": 12}, "stride.*4, 8, 16"),
        (OptionError, {"threshold": 90}, "threshold.*<= 1"),
        (OptionError, {"tau": 0.9}, "tau"),
        (UnsupportedError, {"threshold": (0.5, 0.9, 0.9)}, "3 values.*4 query heads"),
        (UnsupportedError, {"backend": "flash-attn-9"}, "flash-attn-9"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(error, settings, words):
    model = tiny_model("llama")
    with pytest.raises(error, match=words):
        kvdock.attach(model, "xattention", **settings)
    assert model.config._attn_implementation != "kvdock"
