"""The cascade and what follows it: totals, transients, turns, decode, and what is refused."""

from itertools import pairwise

import pytest
import torch

import kvdock
from kvdock.errors import BudgetError, OptionError
from kvdock.kernels.selection import top_positions
from kvdock.kernels.window_scores import pooled, window_votes
from kvdock.policy import AttentionParams
from kvdock.testing import alone, generate
from kvdock.testing_layers import LayerDriver, random_states
from kvdock.testing_models import FAMILIES, left_padded, tiny_model
from kvdock_cakekv import policy as policy_module
from kvdock_cakekv.options import CakeKVOptions
from kvdock_cakekv.policy import CakeKVPolicy

LAYERS, SLOTS, WINDOW = 6, 30, 8
LENGTHS, BUDGET = (150, 70, 20), 40


def states(rows=1, columns=120, seed=0):
    """Return layers that attend more and more sharply."""
    layers = [random_states(seed + i, rows, 2, 2, columns, 64) for i in range(LAYERS)]
    return [(q * (0.3 + 0.5 * i), k, v) for i, (q, k, v) in enumerate(layers)]


def make_driver(slots=SLOTS, **options):
    return LayerDriver(CakeKVPolicy(CakeKVOptions(**{"window": WINDOW, **options})), slots, LAYERS)


def lengths_of(driver):
    return [store.storage.live for store in driver.session.stores]


@pytest.mark.parametrize("slack", [0, 2**14, 2**40])
@pytest.mark.parametrize("chunks", [None, (50, 69, 1)])
def test_slack_and_chunks_change_nothing(slack, chunks, monkeypatch):
    parts, rows = states(2), [120, 77]
    wanted = make_driver()
    wanted.prompt(*parts, lengths=rows)
    monkeypatch.setattr(policy_module, "SLACK_BYTES", slack)
    driver = make_driver()
    driver.prompt(*parts, lengths=rows, chunks=chunks)
    assert [driver.kept(i) for i in range(LAYERS)] == [wanted.kept(i) for i in range(LAYERS)]
    for row in range(2):
        live = [layer[row] for layer in lengths_of(driver)]
        assert sum(live) == LAYERS * SLOTS
        assert min(live) > WINDOW and len(set(live)) > 1
    assert lengths_of(driver) == [store.ledger.live for store in driver.session.stores]
    assert not any("cakekv" in name and rows for name, rows in driver.session.shared.items())


def test_earlier_layers_shrink_as_later_ones_arrive(monkeypatch):
    monkeypatch.setattr(policy_module, "SLACK_BYTES", 0)
    monkeypatch.setattr(policy_module.Cascade, "total_bytes", 0)
    held, revise = [], CakeKVPolicy.revise

    def watched(self, view):
        choices = revise(self, view)
        for layer, choice in choices.items():
            assert choice.index.shape[2] < view.lengths[layer]
        now = [choices[i].index.shape[2] if i in choices else n for i, n in enumerate(view.lengths)]
        held.append(now)
        return choices

    monkeypatch.setattr(CakeKVPolicy, "revise", watched)
    make_driver().prompt(*states())
    prefix = LAYERS * (SLOTS - WINDOW)
    for layer, now in enumerate(held):
        bound = min(prefix, (layer + 1) * (120 - WINDOW))
        assert sum(now) - WINDOW * len(now) <= bound + layer + 1
    for before, after in pairwise(held):
        assert all(new <= old for old, new in zip(before, after, strict=False))
    assert len({now[0] for now in held}) > 3


def test_without_variance_and_preference_it_is_snapkv_with_average_pooling():
    parts = states()
    driver = make_driver(gamma=0.0, tau1=1e12, tau2=1e12)
    driver.prompt(*parts)
    for layer, (q, k, _) in enumerate(parts):
        votes = window_votes(q[:, :, -WINDOW:], k, AttentionParams(64**-0.5))
        chosen = top_positions(pooled(votes[..., :-WINDOW], 5, "avg"), SLOTS - WINDOW)
        recent = list(range(120 - WINDOW, 120))
        assert driver.kept(layer)[0] == [[*head, *recent] for head in chosen[0].tolist()]


def test_layers_that_attend_alike_get_the_same():
    driver = make_driver()
    driver.prompt(*[states()[2]] * LAYERS)
    assert lengths_of(driver) == [[SLOTS]] * LAYERS


def test_constant_attention_shares_evenly():
    """One query has no variance: every preference is nothing, which must not divide by zero."""
    driver = make_driver(window=1)
    driver.prompt(*states())
    assert lengths_of(driver) == [[SLOTS]] * LAYERS


@pytest.mark.parametrize("slots", [1, 2, 5, WINDOW, WINDOW + 1])
def test_a_share_below_the_window_shortens_it(slots):
    driver = make_driver(f"{100 * slots // 120 + 1}%")
    driver.prompt(*states())
    allowed = 120 * (100 * slots // 120 + 1) // 100
    live = [layer[0] for layer in lengths_of(driver)]
    assert sum(live) == LAYERS * allowed
    for layer in range(LAYERS):
        for head in driver.kept(layer)[0]:
            window = max(1, min(WINDOW, allowed - 1))
            assert head[-window:] == [*range(120 - window, 120)]


def test_two_prompts_in_sequence_are_two_fresh_runs():
    policy = CakeKVPolicy(CakeKVOptions(window=WINDOW))
    for seed in (0, 50):
        again, fresh = LayerDriver(policy, SLOTS, LAYERS), make_driver()
        for driver in (again, fresh):
            driver.prompt(*states(seed=seed))
        assert [again.kept(i) for i in range(LAYERS)] == [fresh.kept(i) for i in range(LAYERS)]


def test_what_a_broken_prompt_left_behind_is_not_used():
    broken, fresh = make_driver(), make_driver()
    broken.prompt(*states(seed=50)[:3])  # the model failed in layer 3
    driver = make_driver()
    driver.session.begin_turn = lambda columns: None
    driver.session.prompt_columns, driver.session.shared = 120, broken.session.shared
    for each in (driver, fresh):
        each.prompt(*states())
    assert [driver.kept(i) for i in range(LAYERS)] == [fresh.kept(i) for i in range(LAYERS)]


@pytest.mark.parametrize("first", [120, 20])
def test_later_turns_and_decode_stay_within_the_first_budgets(first):
    driver = make_driver()
    driver.prompt(*states(columns=first))
    allowed = [store.ledger.slots[0] for store in driver.session.stores]
    for turn in range(2):
        driver.prompt(*states(columns=35, seed=10 * turn + 10))
        assert [layer[0] for layer in lengths_of(driver)] == allowed
        for _ in range(3):
            driver.step(*states(columns=1, seed=20 + turn))
            assert [layer[0] for layer in lengths_of(driver)] == allowed
            for layer in range(LAYERS):
                seen = driver.store(layer).ledger.tokens[0]
                for head in driver.kept(layer)[0]:
                    assert head[-WINDOW:] == [*range(seen - WINDOW, seen)]
    assert sum(allowed) == LAYERS * SLOTS


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_on_a_model_is_the_budget_and_stays_there(family):
    model, (batch, rows) = tiny_model(family), left_padded(LENGTHS)
    entry = 2 * model.config.head_dim * 4 * model.config.num_key_value_heads
    layers = model.config.num_hidden_layers
    with kvdock.attach(model, "cakekv", budget=BUDGET, window=8) as dock:
        generate(model, alone(rows[0]), max_new_tokens=1)
        assert dock.report().bytes_held == layers * BUDGET * entry
        generate(model, alone(rows[0]))
        report = dock.report()
        generate(model, batch, max_new_tokens=24)
        held = [(dock.kept_positions(i) >= 0).sum(dim=2) for i in range(layers)]
        dock.report()
    assert sum(row.slots for row in report.layers) == layers * BUDGET
    # one slot more per layer: a step attends before it releases
    assert report.bytes_held == report.bytes_predicted == layers * (BUDGET + 1) * entry
    assert torch.stack(held).sum(dim=0).tolist() == [
        [layers * BUDGET] * 2, [layers * BUDGET] * 2, [layers * min(BUDGET, 20 + 23)] * 2,
    ]  # fmt: skip


@pytest.mark.parametrize("window", [BUDGET, BUDGET + 1])
def test_a_budget_that_the_window_fills_is_refused(window):
    model = tiny_model("llama")
    with pytest.raises(BudgetError, match=f"cakekv.*budget 40tok.*window={window}"):
        kvdock.attach(model, "cakekv", budget=BUDGET, window=window)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", -1), ("gamma", float("nan")), ("gamma", float("inf")), ("tau1", 0),
        ("tau1", -1.6), ("tau2", 0.05), ("tau2", "warm"), ("window", 0), ("kernel", 4),
        ("kernel", 0), ("decode_pool", 1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=f"cakekv.*{name}"):
        kvdock.attach(tiny_model("llama"), "cakekv", **{name: value})
