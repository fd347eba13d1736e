"""The numbers of entries per layer: their sum, their order, their limits, the published ones."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvdock_pyramidkv.options import PyramidKVOptions
from kvdock_pyramidkv.policy import PyramidKVPolicy
from kvdock_pyramidkv.pyramid import exact_budgets

from . import oracle


def slots(tokens, budget, layers, **options):
    return PyramidKVPolicy(PyramidKVOptions(**options)).layer_slots(tokens, budget, layers)


GOLDEN = [
    # budget, window, first layer, last layer, sum over 32 layers; the authors' code, beta 20
    (128, 8, 242, 25, 4272),
    (128, 32, 220, 65, 4560),
    (1024, 32, 1967, 107, 33184),
    (2048, 8, 3986, 111, 65552),
    (2048, 32, 3964, 151, 65840),
]


@pytest.mark.parametrize(("budget", "window", "first", "last", "total"), GOLDEN)
def test_official_rounding_gives_the_published_numbers(budget, window, first, last, total):
    found = slots(131072, budget, 32, window=window, rounding="official")
    assert (found[0], found[-1], sum(found)) == (first, last, total)
    assert len({above - below for above, below in pairwise(found)}) == 1


def test_official_rounding_can_exceed_its_total_by_a_quarter():
    found = slots(131072, 64, 32, window=16, rounding="official")
    assert sum(found) == 2528
    assert sum(slots(131072, 64, 32, window=16)) == 2048


@pytest.mark.parametrize("tokens", [2049, 3000, 4031])
def test_official_rounding_is_level_below_twice_the_mean(tokens):
    assert slots(tokens, 2048, 32, window=32, rounding="official") == [2048] * 32


@pytest.mark.parametrize(
    ("tokens", "first", "second", "last"),
    [(240, 240, 233, 23), (241, 241, 234, 24), (242, 242, 235, 25), (243, 242, 235, 25)],
)
def test_official_rounding_stops_at_the_prompt(tokens, first, second, last):
    """The first layer wants 234 entries beside its window; a short prompt moves some upwards."""
    found = slots(tokens, 128, 32, rounding="official")
    assert (found[0], found[1], found[-1]) == (first, second, last)


def test_a_prompt_just_above_the_budget_flattens_the_pyramid():
    found = slots(2050, 2048, 32, window=32)
    assert (found[0], found[-1], sum(found)) == (2050, 2046, 2048 * 32)


@pytest.mark.parametrize("layers", [28, 32, 36, 80])
@pytest.mark.parametrize("window", [8, 16, 32])
@pytest.mark.parametrize("budget", [64, 128, 1000, 2048, 4096])
def test_the_sum_is_exact_for_models_of_today(layers, window, budget):
    for tokens in (budget + 1, budget + 7, 2 * budget - 1, 2 * budget, 5000, 32768, 131072):
        if tokens <= budget:
            continue
        found = slots(tokens, budget, layers, window=window)
        assert sum(found) == budget * layers
        assert max(found) <= tokens
        wanted = oracle.pyramid((budget - window) * layers, layers, tokens - window, 20)
        assert [count - window for count in found] == wanted


@given(
    layers=st.integers(1, 80),
    window=st.integers(1, 40),
    budget=st.integers(1, 300),
    above=st.integers(1, 100_000),
    beta=st.floats(1, 1000),
)
def test_every_pyramid_falls_and_sums_up(layers, window, budget, above, beta):
    tokens = budget + above
    found = list(slots(tokens, budget, layers, window=window, beta=beta))
    assert sum(found) == budget * layers
    assert found == sorted(found, reverse=True)
    assert max(found) <= tokens
    assert min(found) > min(window, budget - 1)  # at least one entry beside the window
    official = slots(tokens, budget, layers, window=window, beta=beta, rounding="official")
    assert min(official) > min(window, budget - 1)
    assert max(official) <= tokens


@given(
    base=st.integers(1, 3000),
    above=st.integers(1, 9000),
    layers=st.integers(1, 80),
    beta=st.floats(1, 100),
)
def test_the_policy_divides_as_the_oracle_steps(base, above, layers, beta):
    assume(base >= beta)  # below, the policy lifts the last layer to one entry
    wanted = oracle.pyramid(base * layers, layers, base + above, beta)
    assert list(exact_budgets(base, base + above, layers, beta)) == wanted


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_beta_one_is_level(rounding):
    assert set(slots(9999, 512, 32, beta=1, rounding=rounding)) == {512}


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_one_layer_takes_the_budget(rounding):
    assert list(slots(9999, 512, 1, rounding=rounding)) == [512]


@pytest.mark.parametrize("rounding", ["exact", "official"])
def test_tiny_allowances_shrink_the_window(rounding):
    """A share or a size in bytes may give less than the window."""
    assert list(slots(100, 1, 3, rounding=rounding)) == [1, 1, 1]
    assert list(slots(5 + 1, 5, 3, rounding=rounding, beta=1)) == [5, 5, 5]


def test_a_steep_pyramid_never_starves_the_last_layer():
    found = slots(9999, 12, 4, window=8, beta=1000)
    assert (found[0], found[-1], sum(found)) == (15, 9, 48)
