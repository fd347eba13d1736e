"""A policy that sets its own numbers and takes back from earlier layers."""

import torch

from kvdock.policy import CachePolicy, Selection
from kvdock.testing_layers import LayerDriver, random_states

LAYERS, SLOTS, FIRST = 4, 20, 30


class Revising(CachePolicy):
    """Keep the last 30 entries, then, after the last layer, 18 + 2·layer − row of them."""

    revises = True

    def __init__(self):
        self.seen = []

    def select(self, view):
        index = torch.arange(view.length - FIRST, view.length).expand(1, view.keys.shape[1], -1)
        view.shared.setdefault(view.rows, []).append(view.layer)
        return Selection(index, slot_state={"rank": index.float()})

    def revise(self, view):
        self.seen.append((view.layer, view.row, view.lengths, dict(view.shared)))
        for length, state in zip(view.lengths, view.slot_state, strict=True):
            if length == FIRST:
                assert state["rank"][0, 0].diff().eq(1).all() and state["rank"].shape[2] == length
        if view.layer + 1 < view.layers or view.lengths[0] != FIRST:
            return {}
        return {
            layer: Selection(
                torch.arange(FIRST - self.wanted(layer, view.row), FIRST).expand(1, 2, -1)
            )
            for layer in range(view.layers)
        }

    @staticmethod
    def wanted(layer, row):
        return 18 + 2 * layer - row


def run(chunks=None):
    policy = Revising()
    driver = LayerDriver(policy, SLOTS, LAYERS)
    states = [random_states(seed, 3, 2, 2, 60, 16) for seed in range(LAYERS)]
    driver.prompt(*states, lengths=[60, 50, 15], chunks=chunks)
    return policy, driver, states


def test_rows_hold_what_the_revision_leaves_them():
    _, driver, states = run()
    for layer, (_, k, _) in enumerate(states):
        live = [Revising.wanted(layer, 0), Revising.wanted(layer, 1), 15]
        store = driver.store(layer)
        assert store.storage.live == store.ledger.live == live
        assert store.ledger.capacity == store.storage.capacity == max(live)
        for row, length in enumerate((60, 50)):
            recent = list(range(length - live[row], length))
            assert driver.kept(layer)[row] == [recent] * 2
            held = store.storage.row(row)
            assert torch.equal(held.keys[0], k[row, :, 60 - live[row] :])
            assert held.slot_state["rank"][0, 0].tolist() == recent
        assert driver.kept(layer)[2] == [list(range(15))] * 2


def test_a_revision_sees_every_row_after_every_layer():
    policy, _, _ = run()
    assert [(layer, row) for layer, row, _, _ in policy.seen] == [
        (layer, row) for layer in range(LAYERS) for row in range(3)
    ]
    for layer, row, lengths, shared in policy.seen:
        assert lengths == ((15 if row == 2 else FIRST),) * (layer + 1)
        assert set(shared) == {(0,), (1,)}


def test_chunks_end_in_the_same_revision():
    _, driver, _ = run()
    _, chunked, _ = run(chunks=(25, 34, 1))
    for layer in range(LAYERS):
        assert chunked.kept(layer) == driver.kept(layer)


def test_the_cache_grows_from_the_revised_numbers():
    _, driver, _ = run()
    before = [list(store.storage.live) for store in driver.session.stores]
    for seed in range(3):
        driver.step(*[random_states(seed, 3, 2, 2, 1, 16)] * LAYERS)
    for store, live in zip(driver.session.stores, before, strict=True):
        assert store.storage.live == store.ledger.live == [n + 3 for n in live]
