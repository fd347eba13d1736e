from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdock import Budget
from kvdock.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        (2048, "tokens", 2048),
        ("2048", "tokens", 2048),
        ("2048tok", "tokens", 2048),
        (" 2048 tokens ", "tokens", 2048),
        ("25%", "share", Fraction(1, 4)),
        ("33.3%", "share", Fraction(333, 1000)),
        ("100%", "share", 1),
        ("1GiB", "bytes", 2**30),
        ("512MiB", "bytes", 2**29),
        ("512mib", "bytes", 2**29),
        ("1.5 GiB", "bytes", 3 * 2**29),
        ("2GB", "bytes", 2 * 10**9),
        ("100B", "bytes", 100),
    ],
)
def test_accepted_forms(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, Fraction(amount))


@pytest.mark.parametrize(
    "wrong",
    [
        0, -1, True, False, 1.5, 0.25, float("nan"), [], b"25%",
        "", " ", "0", "0tok", "-5", "+5", "2.5", "2.5tok", "1e3", "nan", "inf", "None",
        "0%", "0.0%", "100.1%", "101%", "%", "-25%", "25 % %",
        "0GiB", "0.1B", "GiB", "12parsecs", "1 GiB of memory", "٣", "9" * 5000,
    ],
)  # fmt: skip
def test_a_refusal_shows_the_value_and_the_accepted_forms(wrong):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    for form in ("2048", "25%", "512MiB", "1GiB"):
        assert form in message


LARGEST = 2**63 - 1


@pytest.mark.parametrize("text", [LARGEST, f"{LARGEST}", f"{LARGEST}tok", f"{LARGEST}B"])
def test_the_largest_budget_is_accepted_and_comes_back(text):
    budget = Budget.parse(text)
    assert budget.amount == LARGEST
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "value", [LARGEST + 1, f"{LARGEST + 1}", f"{LARGEST + 1}tok", f"{LARGEST + 1}B", "8388608TiB"]
)
def test_more_than_the_largest_budget_is_refused(value):
    with pytest.raises(BudgetError, match=r"no cache is that large\. Accepted: 2048 or"):
        Budget.parse(value)


def test_a_number_too_long_to_write_is_refused_all_the_same():
    with pytest.raises(BudgetError, match="budget <a int too large to write>: no cache"):
        Budget.parse(10**5000)


def test_an_unknown_unit_is_named():
    with pytest.raises(BudgetError, match="unit 'parsecs' is unknown"):
        Budget.parse("12parsecs")


def test_none_and_a_budget_pass_through():
    budget = Budget.parse("25%")
    assert Budget.parse(None) is None
    assert Budget.parse(budget) is budget


def test_slots_of_each_kind():
    assert Budget.parse(2048).slots(100, slot_bytes=7) == 2048
    assert Budget.parse("25%").slots(1000, slot_bytes=7) == 250
    assert Budget.parse("25%").slots(1003, slot_bytes=7) == 250
    assert Budget.parse("1KiB").slots(1000, slot_bytes=100) == 10


def test_a_share_is_exact_where_floats_are_not():
    # 0.29 * 100 is 28.999... in floating point
    assert Budget.parse("29%").slots(100, slot_bytes=1) == 29


def test_at_least_one_slot_remains():
    assert Budget.parse("1%").slots(5, slot_bytes=1) == 1
    assert Budget.parse("1B").slots(5, slot_bytes=4096) == 1


def test_bytes_need_the_size_of_a_slot():
    with pytest.raises(ValueError, match="slot_bytes is 0"):
        Budget.parse("1GiB").slots(5, slot_bytes=0)


@pytest.mark.parametrize(
    ("given_", "shown"),
    [(7, "7tok"), ("25.0%", "25%"), ("1024MiB", "1GiB"), ("1.5GiB", "1536MiB"), ("1000B", "1000B")],
)
def test_the_text_is_the_shortest_usual_form(given_, shown):
    assert str(Budget.parse(given_)) == shown


forms = st.one_of(
    st.integers(1, 10**9),
    st.integers(1, 10**9).map(lambda n: f"{n}tok"),
    st.decimals("0.0001", 100, places=4).map(lambda share: f"{share:f}%"),
    st.tuples(
        st.decimals(1, 10**6, places=3), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB", "MB"])
    ).map(lambda pair: f"{pair[0]:f}{pair[1]}"),
)


@given(forms)
def test_the_text_of_a_budget_reads_back_as_the_same_budget(form):
    budget = Budget.parse(form)
    assert Budget.parse(str(budget)) == budget


@given(st.decimals("0.01", 100, places=2), st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_share_never_exceeds_its_part_and_grows_with_the_prompt(share, length, more):
    budget = Budget.parse(f"{share:f}%")
    slots = budget.slots(length, slot_bytes=1)
    assert 1 <= slots <= max(1, Fraction(share) / 100 * length)
    assert budget.slots(length + more, slot_bytes=1) >= slots


@given(st.integers(1, 2**40), st.integers(1, 2**20))
def test_bytes_are_never_exceeded_beyond_the_first_slot(size, slot_bytes):
    slots = Budget.parse(f"{size}B").slots(10, slot_bytes=slot_bytes)
    assert slots == 1 or slots * slot_bytes <= size
    assert (slots + 1) * slot_bytes > size
