"""What H2O holds while decoding and in later turns, against a naive simulator; what it refuses."""

import pytest
import torch

import kvdock
from kvdock.budget import Budget
from kvdock.errors import BudgetError, OptionError
from kvdock.testing import generate
from kvdock.testing_layers import LayerDriver, random_states
from kvdock.testing_models import left_padded, tiny_model
from kvdock_h2o.options import H2OOptions
from kvdock_h2o.policy import SCORE, H2OPolicy

from . import oracle

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 64


def run(prompts, steps, slots, *, seed=0, lengths=None, **options):
    """Feed turns and steps to a layer and to naive heads; compare what they hold at each step.

    Args:
        prompts: columns of every turn. steps: decode steps after each.
        lengths: real tokens per row in the first turn.
    """
    lengths = lengths or [prompts[0]]
    driver = LayerDriver(H2OPolicy(H2OOptions(**options)), slots)
    _, recent = oracle.halves(slots, **{k: v for k, v in options.items() if k != "reduce"})
    naive = [
        [oracle.NaiveHead(slots, recent, scaling=HEAD_DIM**-0.5) for _ in range(KV_HEADS)]
        for _ in lengths
    ]

    def feed(states, real):
        for row, heads in enumerate(naive):
            for head, one in enumerate(heads):
                group = slice(head * GROUP, (head + 1) * GROUP)
                queries, keys = states[0][row, group], states[1][row, head]
                one.feed(queries[:, -real[row] :], keys[-real[row] :])
        assert driver.kept() == [[one.held for one in heads] for heads in naive]
        assert driver.store().storage.live == driver.store().ledger.live

    for turn, columns in enumerate(prompts):
        states = draw(seed + turn, len(lengths), columns)
        real = lengths if turn == 0 else [columns] * len(lengths)
        driver.prompt(states, lengths=real)
        feed(states, real)
        for step in range(steps):
            states = draw(seed + 100 * (turn + 1) + step, len(lengths), 1)
            driver.step(states)
            feed(states, [1] * len(lengths))
    return driver


def draw(seed, rows, columns):
    q, k, v = random_states(seed, rows, KV_HEADS, GROUP, columns, HEAD_DIM)
    return q * 1.5, k, v


@pytest.mark.parametrize("options", [{}, {"recent": 2}, {"heavy": 3}, {"heavy": 11, "recent": 1}])
@pytest.mark.parametrize("prompt", [1, 11, 12, 13, 40])
def test_one_entry_goes_at_every_step(prompt, options):
    """3C steps: length C at most, and the entry that goes is the smallest that is not recent."""
    run([prompt], 36, 12, **options)


@pytest.mark.parametrize("slots", [2, 3])
def test_the_smallest_budgets(slots):
    run([20], 3 * slots + 6, slots)


def test_rows_that_start_evicting_at_different_steps():
    run([30], 24, 8, lengths=[30, 5, 8, 1])


def test_later_turns_go_on_accumulating():
    run([40, 3, 25, 1, 12], 4, 12)
    run([4, 3, 25], 2, 12)


def test_ties_go_at_the_highest_position():
    """A zero query adds the same to every entry, so equal scores stay equal."""
    driver = LayerDriver(H2OPolicy(H2OOptions(recent=1)), 6)
    q, k, v = random_states(0, 1, 1, 1, 7, 16)
    driver.prompt((q[:, :, :6], k[:, :, :6], v[:, :, :6]))
    driver.store().storage.table[SCORE][0, 0] = torch.tensor([3.0, 1.0, 1.0, 1.0, 2.0, 5.0])
    driver.step((torch.zeros(1, 1, 1, 16), k[:, :, 6:], v[:, :, 6:]))
    assert driver.kept() == [[[0, 1, 2, 4, 5, 6]]]


def test_a_new_entry_starts_at_its_own_attention():
    driver = LayerDriver(H2OPolicy(H2OOptions()), 4)
    driver.prompt(random_states(0, 1, 1, 1, 9, 16))
    for seed in range(8):
        driver.step(random_states(seed, 1, 1, 1, 1, 16))
        row = driver.store().storage.row(0)
        assert row.slot_state[SCORE][0, 0, -1] < 1  # nothing is left of the slot's last owner


def test_reordered_rows_take_their_scores_along():
    driver = LayerDriver(H2OPolicy(H2OOptions()), 8)
    states = draw(1, 3, 30)
    driver.prompt(states, lengths=[30, 21, 5])
    before = driver.store().storage.table[SCORE].clone()
    driver.store().select_rows(torch.tensor([2, 0, 0]))
    assert torch.equal(driver.store().storage.table[SCORE], before[[2, 0, 0]])
    kept = driver.kept()
    assert kept[1] == kept[2]


def test_memory_of_a_model_stays_at_the_budget():
    model, (batch, _) = tiny_model("llama"), left_padded((90, 70, 20))
    with kvdock.attach(model, "h2o", budget=32) as dock:
        generate(model, batch, max_new_tokens=60)
        report = dock.report()
        counts = (dock.kept_positions(0) >= 0).sum(dim=2)
    assert counts.tolist() == [[32] * 2] * 3
    assert [layer.slots for layer in report.layers] == [32] * 3
    assert report.bytes_held == report.bytes_predicted


def test_both_halves_below_the_budget_are_the_budget_of_long_prompts():
    model, (batch, _) = tiny_model("llama"), left_padded((90,))
    with kvdock.attach(model, "H2O", budget=32, heavy=6, recent=10) as dock:
        generate(model, batch, max_new_tokens=20)
        held = dock.kept_positions(0)
        dock.report()
    assert held.shape[2] == 16
    assert held[0, 0, -10:].tolist() == [*range(99, 109)]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"heavy": 20, "recent": 13}, r"heavy=20 \+ recent=13 exceeds budget 32tok"),
        ({"heavy": 32}, "heavy=32 .*no room for the recent"),
        ({"recent": 40}, "recent=40 .*no room for the heavy"),
    ],
)
def test_halves_over_the_budget_are_refused(options, found):
    model = tiny_model("llama")
    with pytest.raises(BudgetError, match=found):
        kvdock.attach(model, "h2o", budget=32, **options)
    assert model.config._attn_implementation != "kvdock"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recent", 0), ("recent", -1), ("recent", 1.5), ("heavy", 0), ("heavy", -3),
        ("heavy", True), ("reduce", "max"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=f"h2o.*{name}"):
        kvdock.attach(tiny_model("llama"), "h2o", **{name: value})


def test_budgets_too_small_for_two_entries_are_refused():
    policy = H2OPolicy(H2OOptions())
    with pytest.raises(BudgetError, match="1tok"):
        policy.check_budget(Budget.parse(1))
    with pytest.raises(BudgetError, match="-1"):
        kvdock.attach(tiny_model("llama"), "h2o", budget=-1)
    policy.check_budget(Budget.parse(2))
    policy.check_budget(Budget.parse("1%"))  # known only with the prompt: the halves shrink


@pytest.mark.parametrize(
    ("options", "slots", "recent"),
    [
        ({}, 2, 1), ({}, 7, 4), ({}, 2048, 1024), ({}, 1, 1), ({"heavy": 9}, 4, 1),
        ({"recent": 9}, 4, 3), ({"recent": 9}, 1, 1), ({"heavy": 3, "recent": 4}, 7, 4),
    ],
)  # fmt: skip
def test_the_recent_half(options, slots, recent):
    policy = H2OPolicy(H2OOptions(**options))
    assert policy.recent(slots) == recent
    assert policy._recent_rows(torch.tensor([slots, slots])).tolist() == [recent] * 2
