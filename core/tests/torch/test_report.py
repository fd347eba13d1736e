"""`Dock.report` and `Dock.kept_positions` say what is really there."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import kvdock
from kvdock.errors import AccountingError, UnsupportedError
from kvdock.testing_models import FAMILIES, tiny_model

ENTRY = 2 * 16 * 4
"""Bytes of one key and one value of one head."""


def test_text(docked, row, generate):
    generate(docked.model, row, 4)
    lines = str(docked.report()).splitlines()
    name = type(docked.plan.cache_policy).__name__
    assert lines[0].startswith(f"{name}: holds ") and " predicted " in lines[0]
    assert "KiB" in lines[0] and "%)" in lines[0]
    assert lines[1].startswith("time to first token ") and "ms per token" in lines[2]
    assert lines[3].split() == ["layer", "columns", "slots", "bytes"]
    assert [line.split()[:2] for line in lines[4:]] == [["0", "100"], ["1", "100"], ["2", "100"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_bytes_are_what_the_plain_cache_holds(family, policies, batch):
    model, plain = tiny_model(family), DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=plain)
        held = sum(x.untyped_storage().nbytes() for y in plain.layers for x in (y.keys, y.values))
        with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
            model(**batch, past_key_values=dock.new_cache())
            report = dock.report()
    assert report.bytes_full == held
    # rows are 97, 70 and 33 tokens long; the fullest one sets the slots
    assert report.bytes_held == report.bytes_predicted == 3 * 3 * 2 * 48 * ENTRY
    assert report.ratio == pytest.approx(48 / 97)


def test_numbers_after_generate(docked, row, generate):
    generate(docked.model, row, 12)
    report = docked.report()
    ring = docked.plan.cache_policy.acts_on_decode
    assert report.bytes_after_prefill == 3 * 2 * 48 * ENTRY
    assert [layer.slots for layer in report.layers] == [48 if ring else 48 + 11] * 3
    assert report.bytes_held == sum(layer.bytes for layer in report.layers)
    assert report.bytes_full == 3 * 2 * (97 + 11) * ENTRY
    assert report.bytes_state > 0
    assert report.prefill_s > 0 and report.decode_s_per_token > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.ratio = 0.0


def test_times_that_were_not_measured(docked, row, generate):
    generate(docked.model, row, 1)
    report = docked.report()
    assert report.prefill_s > 0 and report.decode_s_per_token is None
    with torch.no_grad():
        docked.model(**row, past_key_values=docked.new_cache())
    report = docked.report()
    assert report.prefill_s is None and report.bytes_after_prefill is None
    assert "time to first token" not in str(report)


def test_before_anything_ran(docked):
    for call in (docked.report, lambda: docked.kept_positions(0)):
        with pytest.raises(UnsupportedError, match=r"nothing ran yet: call model\.generate"):
            call()
    docked.new_cache()
    assert docked.report().bytes_held == 0 and docked.report().ratio == 1.0


def test_the_report_outlives_the_dock(docked, row, generate):
    generate(docked.model, row, 4)
    inside = docked.report()
    docked.detach()
    assert docked.report() == inside


def test_a_storage_that_holds_more_than_it_should(docked, row, generate):
    generate(docked.model, row, 4)
    table = docked.cache.docked[1].store.storage.table
    table["key"] = torch.cat([table["key"], table["key"]], dim=2)
    with pytest.raises(AccountingError, match="layer 1 holds .* predicts .* please report it"):
        docked.report()


def test_a_view_of_something_larger_is_counted_in_full(docked, row, generate):
    generate(docked.model, row, 4)
    table = docked.cache.docked[2].store.storage.table
    table["value"] = torch.cat([table["value"], table["value"]])[:1]
    with pytest.raises(AccountingError, match="layer 2 holds"):
        docked.report()


def test_a_policy_whose_formula_is_wrong(model, policies, row, generate):
    class Optimist(policies.Votes):
        def predicted_slots(self, tokens, slots, appended):
            return min(tokens, slots)

    with kvdock.attach(model, [Optimist()], budget=48) as dock:
        generate(model, row, 4)
        with pytest.raises(AccountingError, match=r"\[51\] entries per row.*Optimist .*\[48\]"):
            dock.report()


def test_kept_positions(docked, batch, generate):
    generate(docked.model, batch, 4)
    ring = docked.plan.cache_policy.acts_on_decode
    for layer in range(3):
        kept = docked.kept_positions(layer)
        assert kept.dtype == torch.int64 and kept.shape == (3, 2, 48 if ring else 51)
        for row, tokens in enumerate((97, 70, 33)):
            for head in range(2):
                live = kept[row, head][kept[row, head] >= 0].tolist()
                assert live == sorted(set(live)), "ascending, none twice"
                assert live[-3:] == [tokens, tokens + 1, tokens + 2], "decode tokens come last"
                assert kept[row, head, len(live) :].eq(-1).all(), "empty slots come last"
                short = 36 if tokens == 33 else 48 if ring else 51
                assert len(live) == short
        if ring:
            assert kept[0, 0].tolist() == list(range(52, 100))


@pytest.mark.parametrize("layer", [3, -1, "first"])
def test_a_layer_that_is_not_managed(docked, row, generate, layer):
    generate(docked.model, row, 1)
    with pytest.raises(UnsupportedError, match=r"not managed; managed layers are \[0, 1, 2\]"):
        docked.kept_positions(layer)
