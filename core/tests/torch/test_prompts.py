"""Prompts of every shape that `generate` accepts."""

import pytest
import torch

import kvdock
from kvdock.testing_models import left_padded


def single(row):
    return {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}


def test_embeddings_as_prompt(docked, batch, generate):
    embeds = docked.model.get_input_embeddings()(batch["input_ids"])
    prompt = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    assert generate(docked.model, prompt) == generate(docked.model, batch)
    docked.report()


def test_columns_that_are_pads_in_every_row(docked, batch, generate):
    wider = {
        name: torch.cat([torch.zeros(3, 11, dtype=torch.long), tensor], dim=1)
        for name, tensor in batch.items()
    }
    assert generate(docked.model, wider) == generate(docked.model, batch)
    assert generate(docked.model, wider, prefill_chunk_size=10) == generate(docked.model, batch)
    docked.report()


def test_a_row_without_any_token_leaves_its_neighbours_alone(docked, batch, generate):
    empty = {name: torch.cat([torch.zeros_like(t[:1]), t]) for name, t in batch.items()}
    expected = generate(docked.model, batch)
    assert generate(docked.model, empty)[1:] == expected
    docked.report()
    kept = docked.kept_positions(0)
    assert (kept[0] < 12).all(), "the empty row holds decode tokens only"


def test_one_padded_row(docked, generate):
    batch, rows = left_padded((97, 60))
    one = {name: tensor[1:] for name, tensor in batch.items()}
    assert one["attention_mask"].sum() == 60
    assert generate(docked.model, one) == generate(docked.model, single(rows[1]))
    assert generate(docked.model, one, prefill_chunk_size=40) == generate(docked.model, one)


@pytest.mark.parametrize("length", [1, 2, 47, 48, 49])
def test_prompts_around_the_budget(docked, generate, length):
    _, rows = left_padded((length,))
    plain_budget = length <= 48
    model = docked.model
    inside = generate(model, single(rows[0]))
    docked.report()
    held = docked.cache.docked[0].store.ledger.entries
    docked.detach()
    if plain_budget and docked.plan.cache_policy.acts_on_decode is False:
        assert inside == generate(model, single(rows[0]))
    assert held == [length]


def test_a_second_turn_with_the_new_tokens_only(docked, batch, generate):
    """Some callers pass the new ids alone, with the mask of the whole history."""
    follow = left_padded((9, 5, 7), seed=1)[0]
    model, results = docked.model, []
    for whole in (True, False):
        cache = docked.new_cache()
        answer = model.generate(**batch, past_key_values=cache, max_new_tokens=6, do_sample=False)
        seen = batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)
        mask = torch.cat([*seen, follow["attention_mask"]], dim=1)
        ids = torch.cat([answer, follow["input_ids"]], dim=1)
        if not whole:
            ids = ids[:, cache.get_seq_length() :]
        turn = {"input_ids": ids, "attention_mask": mask}
        results.append(generate(model, turn, past_key_values=cache))
        docked.report()
    assert results[0] == results[1]


def test_a_share_of_the_prompt_is_a_share_of_each_rows_tokens(model, policy, batch, generate):
    with kvdock.attach(model, [policy], budget="50%") as dock:
        generate(model, batch, 1)
        kept = dock.kept_positions(1)
    assert (kept >= 0).sum(-1)[:, 0].tolist() == [48, 35, 16]


def test_a_budget_in_bytes_covers_the_whole_cache(model, policies, row, generate):
    with kvdock.attach(model, [policies.Votes()], budget="16KiB") as dock:
        generate(model, row, 1)
        held = dock.report().bytes_after_prefill
    slot = 3 * 2 * 2 * 16 * 4
    assert held == 16 * 1024 // slot * slot


def test_a_sparse_prefill_beside_an_eviction(model, policies, row, generate):
    counting = policies.Counting()
    with kvdock.attach(model, [policies.Votes()], budget=48):
        expected = generate(model, row)
    with kvdock.attach(model, [counting, policies.Votes()], budget=48) as dock:
        assert generate(model, row) == expected
        assert dock.report().methods == ("Counting", "Votes")
    assert counting.calls == 3, "the prefill of three layers, and no decode step"
