"""Water-filling: bounds, exact sums, and that a layer never has to grow back."""

import random

import pytest

from kvdock_cakekv.allocation import ceilings, shares, whole

from . import oracle


def case(seed):
    """Return weights (mild to extreme), the mean per layer, and the prompt's prefix entries."""
    rng = random.Random(seed)
    layers, spread = rng.choice((1, 2, 5, 32, 80)), rng.choice((0.0, 0.3, 1.0, 3.0, 60.0))
    weights = [rng.lognormvariate(0, spread) for _ in range(layers)]
    base = rng.choice((1, 2, 7, 96, 2016))
    cap = base + rng.choice((1, 2, 5, 300, 100_000))
    return weights, base, cap


@pytest.mark.parametrize("seed", range(300))
def test_the_cascade_ends_at_the_one_shot_budgets(seed):
    weights, base, cap = case(seed)
    total = len(weights) * base
    held, before = [], []
    for layer in range(1, len(weights) + 1):
        parts = shares(weights[:layer], total, cap)
        assert all(1 <= part <= cap for part in parts)
        assert sum(parts) == pytest.approx(min(total, layer * cap), rel=1e-9)
        for old, new in zip(before, parts, strict=False):
            assert new <= old * (1 + 1e-9)  # nothing has to grow back
        before = parts
        held = [min(pair) for pair in zip([*held, cap], ceilings(parts, cap), strict=True)]
        assert sum(held) <= min(total, layer * cap) + layer  # the transient overshoot
    final = whole(shares(weights, total, cap), total)
    assert sum(final) == total
    assert all(1 <= n <= h for n, h in zip(final, held, strict=True))


@pytest.mark.parametrize("seed", range(100))
def test_shares_equal_the_oracle(seed):
    weights, base, cap = case(seed)
    total = base * len(weights)
    wanted = oracle.water_level(weights, total, cap)
    assert shares(weights, total, cap) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("base", [1, 7, 2016])
@pytest.mark.parametrize("weight", [1e-260, 1.0, 3.3, 1e260])
def test_equal_weights_share_evenly(weight, base):
    parts = shares([weight] * 33, 33 * base, base + 5)
    assert whole(parts, 33 * base) == [base] * 33


def test_the_scale_of_weights_does_not_matter():
    weights = [0.3, 2.0, 5.0, 0.01]
    scaled = [weight * 2.0**40 for weight in weights]
    assert shares(weights, 400, 300) == pytest.approx(shares(scaled, 400, 300))


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    parts = shares([1000.0, 2.0, 1.0], 30, 15)
    assert parts == pytest.approx([15, 10, 5])


def test_a_layer_that_attends_to_nothing_keeps_one_entry():
    assert whole(shares([1e-260, 1.0, 1.0], 30, 100), 30) == [1, 15, 14]


def test_equal_remainders_go_to_the_lower_layer():
    assert whole([1.5, 1.5, 1.5, 1.5], 6) == [2, 2, 1, 1]
    assert whole([2.0, 1.25, 2.75], 6) == [2, 1, 3]


def test_a_budget_that_the_window_fills_leaves_nothing():
    assert whole(shares([1.0, 2.0], 0, 9), 0) == [0, 0]
