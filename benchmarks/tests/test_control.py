"""The random control keeps exactly its budget, and the same entries in every batch."""

import torch

import kvdock
from kvdock.testing import Case, alone, generate, left_padded, tiny_model


def kept(model, batch, **options):
    with kvdock.attach(model, "random", budget=24, **options) as dock:
        generate(model, batch, max_new_tokens=1)
        return [dock.kept_positions(layer) for layer in range(3)]


def test_budget_and_batch_independence():
    model, (batch, rows) = tiny_model("llama"), left_padded((60, 41))
    together = kept(model, batch)
    for index, row in enumerate(rows):
        for layer, single in enumerate(kept(model, alone(row))):
            assert single.shape[2] == 24
            assert torch.equal(together[layer][index], single[0])


def test_heads_layers_and_seeds_differ():
    model, (_, rows) = tiny_model("llama"), left_padded((60,))
    first, other = kept(model, alone(rows[0])), kept(model, alone(rows[0]), seed=1)
    assert not torch.equal(first[0][0, 0], first[0][0, 1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_window_is_kept():
    model, (_, rows) = tiny_model("llama"), left_padded((60,))
    positions = kept(model, alone(rows[0]), window=8)[0]
    assert torch.equal(positions[0, 0, -8:], torch.arange(52, 60))


def test_contract_of_batches():
    from kvdock.testing import check_padded_batch

    check_padded_batch(Case("random"))
