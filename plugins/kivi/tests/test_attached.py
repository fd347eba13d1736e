"""KIVI on whole models."""

import pytest
import torch

import kvdock
from kvdock.errors import OptionError, UnsupportedError
from kvdock.testing_models import FAMILIES, left_padded, tiny_model
from kvdock_kivi.options import KiviOptions
from kvdock_kivi.policy import KiviPolicy
from kvdock_kivi.quantise import quantise_keys

from .harness import packed_bytes

OPTIONS = {"bits": 2, "group_size": 32, "residual_length": 32}


def model_of(family):
    return tiny_model(family, num_hidden_layers=2, head_dim=32)


def generate(model, batch, new=6, **settings):
    return model.generate(**batch, max_new_tokens=new, do_sample=False, **settings)


def stored(dock, row):
    """Return one row of every layer, as it is kept."""
    return [layer.store.storage.row(row) for layer in dock.cache.docked]


@pytest.mark.parametrize(
    ("family", "pads"),
    [*(("llama", pads) for pads in (0, 1, 31, 32, 200)), *((name, 31) for name in FAMILIES[1:])],
)
def test_pads_never_enter_a_group(family, pads):
    model = model_of(family)
    (row,), (other,) = left_padded((75,))[1], left_padded((75 + pads,), seed=1)[1]
    ids = torch.zeros(2, 75 + pads, dtype=torch.long)
    ids[0, pads:], ids[1] = row, other
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    with kvdock.attach(model, "kivi", **OPTIONS) as dock:
        alone = generate(model, {"input_ids": row[None], "attention_mask": torch.ones(1, 75)})
        wanted = stored(dock, 0)
        padded = generate(model, {"input_ids": ids, "attention_mask": mask})
        found = stored(dock, 0)
        assert dock.report().ratio < 0.75
    assert torch.equal(alone[0, 75:], padded[0, 75 + pads :])
    for one, two in zip(wanted, found, strict=True):
        # the model's own rounding differs between batches; codes of 64 packed keys must not
        assert torch.allclose(one.keys[:, :, :64], two.keys[:, :, :64], atol=1e-5)
        assert torch.allclose(one.values, two.values, atol=1e-5)


@pytest.mark.parametrize("pads", [0, 1, 31, 32, 200])
def test_packed_bytes_do_not_depend_on_padding(pads):
    model = model_of("llama")
    attention = model.model.layers[0].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        # one weight an output: its product rounds alike in a batch of any shape
        places = torch.arange(projection.weight.shape[0]) % projection.weight.shape[1]
        projection.weight.data = torch.nn.functional.one_hot(
            places, projection.weight.shape[1]
        ).float()
    (row,), (other,) = left_padded((101,))[1], left_padded((101 + pads,), seed=1)[1]
    ids = torch.stack([torch.cat([row.new_zeros(pads), row]), other])
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0

    def packed(batch):
        with kvdock.attach(model, "kivi", **OPTIONS) as dock:
            generate(model, batch, 2)
            return dock.cache.docked[0].store.storage

    alone = packed({"input_ids": row[None], "attention_mask": torch.ones(1, 101)})
    padded = packed({"input_ids": ids, "attention_mask": mask})
    assert alone.live == [102] and padded.live == [102, 102 + pads]
    for name, wanted in packed_bytes(alone).items():
        found = packed_bytes(padded)[name][0, :, : wanted.shape[2]]
        assert torch.equal(found, wanted[0]), name
        assert wanted.count_nonzero() > 0, name


def test_the_prompt_is_packed_whole_windows_of_keys_at_a_time():
    model = model_of("llama")
    batch, _ = left_padded((75,))
    with kvdock.attach(model, "kivi", bits=16) as dock:
        generate(model, batch, 2)
        plain = stored(dock, 0)[0]
    with kvdock.attach(model, "kivi", **OPTIONS) as dock:
        generate(model, batch, 2)
        cache, kept = dock.cache.docked[0].store.storage, stored(dock, 0)[0]
    _, scale, zero = quantise_keys(plain.keys[:, :, :64], cache.geometry)
    assert torch.equal(cache.cache.key_scale[:, :, :2], scale)
    assert torch.equal(cache.cache.key_zero[:, :, :2], zero)
    assert torch.equal(kept.keys[:, :, 64:], plain.keys[:, :, 64:])
    assert (kept.keys[:, :, :64] - plain.keys[:, :, :64]).abs().max() > 0.01
    assert torch.equal(kept.values[:, :, -32:], plain.values[:, :, -32:])


def test_sixteen_bits_are_the_plain_model():
    model = model_of("llama")
    batch, _ = left_padded((80, 40))
    plain = generate(model, batch)
    with kvdock.attach(model, "kivi", bits=16) as dock:
        assert torch.equal(generate(model, batch), plain)
        assert dock.report().ratio >= 1


def test_four_bits_follow_the_plain_model_more_closely_than_two():
    model = model_of("qwen3")
    batch, _ = left_padded((97, 60))
    settings = {"output_logits": True, "return_dict_in_generate": True}
    plain = torch.stack(generate(model, batch, 4, **settings).logits)
    gaps = []
    for bits in (4, 2):
        with kvdock.attach(model, "kivi", **{**OPTIONS, "bits": bits}):
            logits = torch.stack(generate(model, batch, 4, **settings).logits)
        assert torch.allclose(logits[0], plain[0], atol=1e-4)  # the prompt's own
        gaps.append((logits[1] - plain[1]).abs().mean())
    assert 0 < gaps[0] < gaps[1] / 2


@pytest.mark.beside("snapkv")
def test_it_packs_what_an_evicting_method_keeps():
    model = model_of("llama")
    batch, _ = left_padded((97, 80))
    with kvdock.attach(model, "snapkv+kivi", budget=64, window=8, **OPTIONS) as dock:
        generate(model, batch, 10)
        report = dock.report()
        kept = dock.kept_positions(0)
        assert report.bytes_held == report.bytes_predicted
    assert kept.shape == (2, 2, 64 + 9)
    assert (kept[0, 0].diff() > 0).all() and kept[0, 0, -9:].tolist() == list(range(97, 106))


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (OptionError, {"bits": 3}, "bits.*2, 4, 16"),
        (OptionError, {"group_size": 16}, "group_size.*32, 64, 128"),
        (OptionError, {"group_size": 64, "residual_length": 96}, "96.*multiple of group_size, 64"),
        (OptionError, {"residual_length": 0}, "residual_length"),
        (UnsupportedError, {"group_size": 64}, "head_dim is 32.*multiple of group_size, 64"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(error, settings, words):
    model = model_of("llama")
    with pytest.raises(error, match=words):
        kvdock.attach(model, "kivi", **settings)
    assert model.config._attn_implementation != "kvdock"


def test_number_formats_other_than_floats_are_refused():
    class Facts:
        head_dim, dtype = 64, torch.float64

    with pytest.raises(UnsupportedError, match="float64.*float32, float16 or bfloat16"):
        KiviPolicy(KiviOptions()).bind(Facts())


def test_the_defaults_suit_grouped_queries():
    options = KiviOptions()
    assert (options.bits, options.group_size, options.residual_length) == (4, 32, 128)
