"""L2Compress on a model: its memory, and what it refuses."""

import pytest

import kvdock
from kvdock.errors import BudgetError, OptionError, UnsupportedError
from kvdock.testing import generate
from kvdock.testing_models import left_padded, tiny_model

LENGTHS, BUDGET = (90, 70, 20), 32


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("skip_layers", [(0, 1), (1,), ()])
def test_memory_is_what_the_formula_says(model, skip_layers):
    batch, _ = left_padded(LENGTHS)
    with kvdock.attach(model, "l2compress", budget=BUDGET, skip_layers=skip_layers) as dock:
        generate(model, batch, max_new_tokens=1)
        report = dock.report()
        positions = [dock.kept_positions(layer) for layer in range(3)]
    slots = [90 if layer in skip_layers else BUDGET for layer in range(3)]
    assert [layer.slots for layer in report.layers] == slots
    entry = 2 * model.config.head_dim * 4 * model.config.num_key_value_heads * len(LENGTHS)
    assert report.bytes_held == report.bytes_predicted == sum(slots) * entry
    for layer, held in enumerate(positions):
        full = layer in skip_layers
        counts = [n if full else min(n, BUDGET) for n in LENGTHS]
        assert (held >= 0).sum(dim=2).tolist() == [[count] * 2 for count in counts]


def test_a_skipped_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(UnsupportedError, match=r"layer 3,.* 3 layers .*0 to 2"):
        kvdock.attach(model, "l2compress", skip_layers=(0, 3))
    assert model.config._attn_implementation != "kvdock"


@pytest.mark.parametrize("recent", [32, 40])
def test_a_budget_that_recent_fills_is_refused(model, recent):
    with pytest.raises(BudgetError, match=f"budget 32tok.*recent={recent}"):
        kvdock.attach(model, "l2compress", budget=BUDGET, recent=recent)


def test_a_budget_in_bytes_is_refused_where_layers_are_skipped(model):
    with pytest.raises(BudgetError, match=r"1MiB.*skip_layers=\(\)"):
        kvdock.attach(model, "l2compress", budget="1MiB")
    batch, _ = left_padded(LENGTHS)
    with kvdock.attach(model, "L2Compress", budget="96KiB", skip_layers=()) as dock:
        generate(model, batch, max_new_tokens=1)
        assert dock.report().bytes_held <= 96 * 2**10


@pytest.mark.parametrize(
    ("name", "value"),
    [("skip_layers", (-1,)), ("skip_layers", "first"), ("recent", -1), ("recompress", 1)],
)
def test_values_out_of_range_are_refused(model, name, value):
    with pytest.raises(OptionError, match=f"l2compress.*{name}"):
        kvdock.attach(model, "l2compress", **{name: value})
