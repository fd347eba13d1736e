from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdock.errors import OptionError
from kvdock.options import Options, build, describe, option


@dataclass(frozen=True, slots=True)
class Sample(Options):
    window: int = option(32, help="queries that vote", symbol="α", ge=1, le=64)
    ratio: float = option(0.5, help="share kept", gt=0, lt=1)
    pooling: str = option("avg", help="smoothing", choices=("avg", "max"))
    skip: tuple[int, ...] = option((), help="layers left alone", ge=0, multiple=True)
    floor: int | None = option(None, help="least", ge=1)
    flag: bool = option(False, help="switch")


def test_defaults_are_accepted():
    assert build(Sample, {}) == Sample(32, 0.5, "avg", (), None, False)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        build(Sample, {}).window = 3


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("window", 0, "a whole number >= 1, <= 64"),
        ("window", 65, "a whole number >= 1, <= 64"),
        ("window", 3.0, "a whole number"),
        ("window", True, "a whole number"),
        ("window", "32", "a whole number"),
        ("window", None, "a whole number"),
        ("ratio", 0, "a number > 0, < 1"),
        ("ratio", 1.0, "a number > 0, < 1"),
        ("ratio", float("nan"), "a number > 0, < 1"),
        ("ratio", True, "a number"),
        ("pooling", "median", "one of avg, max"),
        ("pooling", 3, "one of avg, max"),
        ("skip", [0, -1], "a whole number >= 0"),
        ("skip", ["a"], "a whole number >= 0"),
        ("floor", 0, "a whole number >= 1"),
        ("flag", 1, "true or false"),
    ],
)
def test_a_wrong_value_names_the_option_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(OptionError) as caught:
        build(Sample, {name: value})
    message = str(caught.value)
    culprit = value if not isinstance(value, list) else value[-1]
    assert repr(name) in message
    assert repr(culprit) in message
    assert f"expected {allowed}" in message


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**5000], ids=["first", "least", "long"])
def test_an_unbounded_number_ends_where_texts_of_it_would(value):
    assert build(Sample, {"floor": 2**63 - 1}).floor == 2**63 - 1
    with pytest.raises(OptionError, match=r"option 'floor' is .*(large|expected)"):
        build(Sample, {"floor": value})


def test_the_constructor_checks_too():
    with pytest.raises(OptionError, match="'window' is -5"):
        Sample(window=-5)


def test_an_unknown_option_gets_a_suggestion_and_the_list():
    with pytest.raises(
        OptionError, match=r"'windw'\. Did you mean 'window'\? Known options: window"
    ):
        build(Sample, {"windw": 3})


def test_an_unknown_option_far_from_all_gets_no_guess():
    with pytest.raises(OptionError) as caught:
        build(Sample, {"zzz": 3})
    assert "Did you mean" not in str(caught.value)


def test_options_of_a_method_without_any():
    with pytest.raises(OptionError, match="has no options"):
        build(Options, {"window": 3})


def test_a_whole_number_serves_where_a_number_is_asked():
    @dataclass(frozen=True, slots=True)
    class Wide(Options):
        tau: float = option(1.0, help="temperature", gt=0)

    value = build(Wide, {"tau": 2}).tau
    assert (value, type(value)) == (2.0, float)


def test_several_values_become_a_tuple_and_one_value_a_tuple_of_one():
    assert build(Sample, {"skip": [0, 1]}).skip == (0, 1)
    assert build(Sample, {"skip": 3}).skip == (3,)


def test_validate_sees_checked_values_and_can_refuse():
    @dataclass(frozen=True, slots=True)
    class Pair(Options):
        low: int = option(1, help="low", ge=0)
        high: int = option(2, help="high", ge=0)

        def validate(self):
            if self.low > self.high:
                raise OptionError(f"option 'low' is {self.low}, expected at most high={self.high}.")

    assert build(Pair, {"low": 2}).low == 2
    with pytest.raises(OptionError, match="at most high=2"):
        build(Pair, {"low": 3})
    with pytest.raises(OptionError, match="'low' is -1"):
        build(Pair, {"low": -1})


def test_a_plain_field_is_checked_for_its_type_only():
    @dataclass(frozen=True, slots=True)
    class Plain(Options):
        size: int = 3

    assert build(Plain, {"size": -9}).size == -9
    with pytest.raises(OptionError, match="expected a whole number"):
        build(Plain, {"size": "a"})


def test_describe_lists_every_field_in_order():
    rows = describe(Sample)
    assert [row.name for row in rows] == ["window", "ratio", "pooling", "skip", "floor", "flag"]
    assert rows[0] == ("window", 32, ">= 1, <= 64", "α", "queries that vote")
    assert rows[2].range == "one of avg, max"
    assert rows[5].range == ""


@given(st.integers(-1000, 1000))
def test_a_bounded_whole_number_is_accepted_exactly_inside_its_bounds(value):
    if 1 <= value <= 64:
        assert build(Sample, {"window": value}).window == value
    else:
        with pytest.raises(OptionError):
            build(Sample, {"window": value})


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_open_bounds_exclude_their_ends(value):
    if 0 < value < 1:
        assert build(Sample, {"ratio": value}).ratio == value
    else:
        with pytest.raises(OptionError):
            build(Sample, {"ratio": value})
