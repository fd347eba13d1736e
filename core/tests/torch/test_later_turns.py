"""What a row may hold after a second turn, when its policy chooses again."""

import pytest

from kvdock.testing_layers import LayerDriver, random_states


def held(policy, budget, lengths):
    """Return (held, predicted) entries after prompts of these lengths."""
    driver = LayerDriver(policy, budget, layers=2)
    for seed, length in enumerate(lengths):
        states = random_states(seed, 1, 2, 2, length, 16)
        driver.prompt(states, states)
    store = driver.store(1)
    return store.storage.live, store.ledger.live


@pytest.mark.parametrize("lengths", [(60, 40), (20, 80)])
def test_a_share_follows_all_tokens_seen(policies, lengths):
    assert held(policies.Votes(), "25%", lengths) == ([25], [25])


@pytest.mark.parametrize("lengths", [(60, 40), (20, 80)])
def test_rows_held_during_decode_keep_their_first_allowance(policies, lengths):
    first = lengths[0] // 4
    assert held(policies.Ring(), "25%", lengths) == ([first], [first])


def test_rows_held_during_decode_are_held_after_turns_whatever_the_policy_says(policies):
    class Forgetful(policies.Ring):
        acts_on_later_turns = False

    assert held(Forgetful(), 24, (60, 40)) == ([24], [24])


def test_layers_get_shares_of_their_own_after_a_short_first_prompt(policies):
    class Uneven(policies.Votes):
        def layer_slots(self, tokens, slots, layers):
            return [tokens, slots]

    driver = LayerDriver(Uneven(), 30, layers=2)
    for seed, length in enumerate((20, 80)):
        states = random_states(seed, 1, 2, 2, length, 16)
        driver.prompt(states, states)
    assert [store.storage.live for store in driver.session.stores] == [[100], [30]]
    assert [store.ledger.live for store in driver.session.stores] == [[100], [30]]
