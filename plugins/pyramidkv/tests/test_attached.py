"""PyramidKV on a model: its memory, its turns, and what it refuses."""

import pytest
import torch

import kvdock
from kvdock.errors import BudgetError, OptionError
from kvdock.testing import alone, generate
from kvdock.testing_layers import LayerDriver, random_states
from kvdock.testing_models import left_padded, tiny_model
from kvdock_pyramidkv.options import PyramidKVOptions
from kvdock_pyramidkv.policy import PyramidKVPolicy

LENGTHS, BUDGET = (150, 70, 20), 32


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=4)


def entry(model, rows):
    return 2 * model.config.head_dim * 4 * model.config.num_key_value_heads * rows


@pytest.mark.parametrize("options", [{}, {"beta": 1}, {"window": 16}, {"rounding": "official"}])
def test_memory_is_what_the_formula_says(model, options):
    batch, _ = left_padded(LENGTHS)
    with kvdock.attach(model, "pyramidkv", budget=BUDGET, **options) as dock:
        generate(model, batch, max_new_tokens=1)
        report = dock.report()
        held = [(dock.kept_positions(layer) >= 0).sum(dim=2).tolist() for layer in range(4)]
    policy = PyramidKVPolicy(PyramidKVOptions(**options))
    rows = [policy.layer_slots(n, BUDGET, 4) if n > BUDGET else [n] * 4 for n in LENGTHS]
    for layer in range(4):
        assert held[layer] == [[slots[layer]] * 2 for slots in rows]
    most = [max(slots) for slots in zip(*rows, strict=True)]
    assert [layer.slots for layer in report.layers] == most
    assert report.bytes_held == report.bytes_predicted == sum(most) * entry(model, len(LENGTHS))


@pytest.mark.beside("snapkv")
def test_one_prompt_takes_the_memory_of_equal_layers(model):
    _, rows = left_padded(LENGTHS)
    for method in ("pyramidkv", "snapkv"):
        with kvdock.attach(model, method, budget=BUDGET, window=8) as dock:
            generate(model, alone(rows[0]), max_new_tokens=1)
            assert dock.report().bytes_held == 4 * BUDGET * entry(model, 1)


@pytest.mark.beside("snapkv")
def test_a_level_pyramid_keeps_what_snapkv_keeps(model):
    batch, _ = left_padded(LENGTHS)
    found = []
    for method, options in (("pyramidkv", {"beta": 1}), ("snapkv", {})):
        with kvdock.attach(model, method, budget=BUDGET, window=8, **options) as dock:
            tokens = generate(model, batch)
            found.append((tokens, [dock.kept_positions(layer) for layer in range(4)]))
    assert torch.equal(found[0][0], found[1][0])
    for left, right in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(left, right)


def turns(policy, lengths):
    driver = LayerDriver(policy, BUDGET, 4)
    for seed, length in enumerate(lengths):
        driver.prompt(*[random_states(seed, 1, 2, 2, length, 64)] * 4)
    for store in driver.session.stores:
        assert store.storage.live == store.ledger.live
    return driver, [store.storage.live[0] for store in driver.session.stores]


@pytest.mark.parametrize("lengths", [(120, 40), (20, 140), (30, 3)])
def test_a_later_turn_is_compressed_to_the_pyramid_of_the_whole_text(lengths):
    policy = PyramidKVPolicy(PyramidKVOptions(recompress=True))
    driver, live = turns(policy, lengths)
    wanted = policy.layer_slots(sum(lengths), BUDGET, 4)
    if lengths[0] > BUDGET:  # layers cannot win back what the first turn dropped
        first = policy.layer_slots(lengths[0], BUDGET, 4)
        wanted = [min(w, f + lengths[1]) for w, f in zip(wanted, first, strict=True)]
    assert live == list(wanted)
    window = min(8, lengths[1])
    for layer in range(4):
        for head in driver.kept(layer)[0]:
            assert head[-window:] == [*range(sum(lengths) - window, sum(lengths))]


def test_without_recompressing_a_later_turn_is_appended():
    policy = PyramidKVPolicy(PyramidKVOptions())
    _, live = turns(policy, (120, 40))
    assert live == [slots + 40 for slots in policy.layer_slots(120, BUDGET, 4)]


@pytest.mark.parametrize("window", [32, 40])
def test_a_budget_that_the_window_fills_is_refused(model, window):
    with pytest.raises(BudgetError, match=f"budget 32tok.*window={window}"):
        kvdock.attach(model, "pyramidkv", budget=BUDGET, window=window)
    assert model.config._attn_implementation != "kvdock"


def test_a_budget_in_bytes_is_kept_exactly_or_refused(model):
    size = f"{4 * BUDGET * entry(model, 1)}B"
    _, rows = left_padded(LENGTHS)
    with kvdock.attach(model, "pyramidkv", budget=size) as dock:
        generate(model, alone(rows[0]), max_new_tokens=1)
        assert f"{dock.report().bytes_held}B" == size
    with pytest.raises(BudgetError, match="rounding='exact'"):
        kvdock.attach(model, "pyramidkv", budget=size, rounding="official")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.5), ("beta", float("nan")), ("beta", "steep"), ("window", 0), ("kernel", 4),
        ("kernel", 0), ("pooling", "sum"), ("rounding", "up"), ("recompress", 1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(model, name, value):
    with pytest.raises(OptionError, match=f"pyramidkv.*{name}"):
        kvdock.attach(model, "pyramidkv", **{name: value})
