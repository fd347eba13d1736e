"""The counts a layer keeps on the host."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvdock.ledger import Ledger
from kvdock.storage import grown_capacity

pytestmark = pytest.mark.versionless


@given(st.integers(0, 5000), st.integers(0, 5500), st.none() | st.integers(1, 6000))
def test_capacity_grows_by_an_eighth_and_not_past_the_limit(capacity, need, limit):
    grown = grown_capacity(capacity, need, limit)
    assert grown >= max(need, capacity)
    if need <= capacity:
        assert grown == capacity
    else:
        assert grown <= max(need, capacity + 256)
        assert limit is None or grown <= max(need, limit)
        assert grown in (need, limit) or grown - capacity >= 16


def test_copies_stay_rare():
    capacity, copies = 2048, 0
    for need in range(2049, 6145):
        grown = grown_capacity(capacity, need, None)
        copies += grown != capacity
        capacity = grown
    assert copies == 4096 / 256


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=4),
    st.integers(0, 40),
    st.sampled_from(["votes", "ring"]),
)
def test_live_entries_follow_the_policy(policies, rows, steps, kind):
    policy = policies.Votes() if kind == "votes" else policies.Ring()
    ledger = Ledger(policy)
    ledger.begin_turn(len(rows))
    assert ledger.bring([tokens for tokens, _ in rows]) == [0] * len(rows)
    ledger.slots = [slots for _, slots in rows]
    ledger.compressed(ledger.tokens)
    for _ in range(steps):
        ledger.step()
    for row, (tokens, slots) in enumerate(rows):
        kept = min(tokens, slots)
        expected = min(kept + steps, slots) if kind == "ring" else kept + steps
        assert (ledger.live[row], ledger.tokens[row]) == (expected, tokens + steps)
    assert ledger.capacity >= max(ledger.live)
    if kind == "ring":
        assert ledger.capacity <= max(slots for _, slots in rows) + 1


def test_without_a_policy_everything_stays():
    ledger = Ledger(None)
    ledger.begin_turn(2)
    ledger.bring([5, 3])
    ledger.slots = [5, 3]
    ledger.compressed(ledger.tokens)
    ledger.step()
    assert ledger.live == [6, 4] and ledger.limit is None
    assert ledger.bring([2, 0]) == [6, 4], "the first new tokens' positions"


@pytest.mark.parametrize("order", [[1, 0], [0], [1, 1, 0]])
def test_rows_move_together(policies, order):
    ledger = Ledger(policies.Votes())
    ledger.begin_turn(2)
    ledger.bring([50, 20])
    ledger.slots = [30, 31]
    ledger.compressed(ledger.tokens)
    assert not ledger.even
    live = ledger.live
    ledger.select_rows(order)
    assert ledger.live == [live[row] for row in order]
    assert ledger.tokens == [[50, 20][row] for row in order]
