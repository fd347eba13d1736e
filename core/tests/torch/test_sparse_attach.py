"""Sparse prefill in a model: padded batches, chunks, later turns, and beside a cache method."""

import pytest
import torch

import kvdock
from kvdock.errors import UnsupportedError
from kvdock.kernels.blocks import BlockGrid, all_blocks, lists_from_mask
from kvdock.kernels.sparse import choose_sparse_backend
from kvdock.policy import AttentionPolicy

BLOCK = 16


class Blocks(AttentionPolicy):
    """Attend over all causal blocks, or without those of odd number but the diagonal's."""

    def __init__(self, *, even_only=False, dense_below=0):
        self.even_only = even_only
        self.dense_below = dense_below
        self.seen = []

    def bind(self, facts, backend):
        self.facts = facts
        self.kernel = choose_sparse_backend(
            backend, facts.device, facts.dtype, facts.head_dim, BLOCK
        )

    def prefill(self, query, key, value, params, *, layer):
        grid = BlockGrid(query.shape[2], key.shape[2], BLOCK)
        if grid.keys < self.dense_below:
            return None
        self.seen.append((layer, query.shape[0], grid.queries, grid.keys))
        lists = all_blocks(grid, query.shape[0], query.shape[1], query.device)
        if self.even_only:
            row = torch.arange(grid.rows)[:, None] + grid.first
            column = torch.arange(grid.key_blocks)
            mask = (column <= row) & ((column % 2 == 0) | (column == row))
            shape = (query.shape[0], query.shape[1], -1, -1)
            lists = lists_from_mask(mask.expand(shape), BLOCK)
        return self.kernel.attend(query, key, value, lists, params)


class Unbound(AttentionPolicy):
    """A policy that takes no kernel."""

    def prefill(self, query, key, value, params, *, layer):
        return None


@torch.no_grad()
def logits(model, dock, ids, mask=None, cache=None, **kwargs):
    cache = cache or dock.new_cache(**kwargs)
    return model(ids, attention_mask=mask, past_key_values=cache).logits, cache


def test_the_policy_hears_of_the_model(model):
    policy = Blocks()
    with kvdock.attach(model, [policy]):
        facts = policy.facts
    assert (facts.device.type, facts.dtype) == ("cpu", torch.float32)
    assert facts.head_dim == model.model.layers[0].self_attn.head_dim


def test_all_blocks_are_dense_attention(model, batch, generate):
    plain = generate(model, batch)
    policy = Blocks()
    with kvdock.attach(model, [policy]) as dock:
        assert generate(model, batch) == plain
        assert {layer.slots for layer in dock.report().layers} == {97 + 11}
    assert {length for *_, length in policy.seen} == {97, 70, 33}


def test_a_row_does_not_depend_on_its_padding(model, batch):
    with kvdock.attach(model, [Blocks(even_only=True)]) as dock:
        padded, _ = logits(model, dock, ids=batch["input_ids"], mask=batch["attention_mask"])
        for row, real in enumerate(batch["attention_mask"].bool()):
            alone, _ = logits(model, dock, batch["input_ids"][row : row + 1, real])
            torch.testing.assert_close(padded[row : row + 1, real], alone, atol=1e-4, rtol=1e-4)


def test_sparse_is_not_dense(model, row):
    with kvdock.attach(model, [Blocks()]) as dock:
        dense, _ = logits(model, dock, row["input_ids"])
    with kvdock.attach(model, [Blocks(even_only=True)]) as dock:
        sparse, _ = logits(model, dock, row["input_ids"])
    assert (dense - sparse).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", [(97,), (32, 97), (50, 51, 97)])
def test_chunks_are_the_whole_prompt(model, row, cuts):
    ids = row["input_ids"]
    with kvdock.attach(model, [Blocks(even_only=True)]) as dock:
        whole, _ = logits(model, dock, ids)
        cache, parts, start = dock.new_cache(prompt_length=97), [], 0
        for stop in cuts:
            part, _ = logits(model, dock, ids[:, start:stop], cache=cache)
            parts.append(part)
            start = stop
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_second_turn_attends_to_the_first(model, row):
    policy = Blocks()
    first, second = row["input_ids"], row["input_ids"][:, :40]
    with torch.no_grad():
        plain = model(torch.cat([first, second], 1)).logits[:, 97:]
    with kvdock.attach(model, [policy]) as dock:
        _, cache = logits(model, dock, first)
        found, _ = logits(model, dock, second, cache=cache)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert (0, 1, 40, 137) in policy.seen


def test_beside_a_cache_method(model, batch, policies, generate):
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        alone = generate(model, batch)
        kept = dock.kept_positions(0)
    with kvdock.attach(model, [Blocks(), policies.Votes()], budget=48) as dock:
        assert generate(model, batch) == alone
        assert torch.equal(dock.kept_positions(0), kept)


def test_beside_snapkv(model, batch, generate):
    pytest.importorskip("kvdock_snapkv")
    with kvdock.attach(model, "snapkv", budget=48, window=8):
        alone = generate(model, batch)
    policy, host = Blocks(), kvdock.default_host()
    record = host.load("snapkv")
    built = host.build_policy(record, record.make_options(window=8))
    with kvdock.attach(model, [policy, built], budget=48) as dock:
        assert generate(model, batch) == alone
        assert dock.report().ratio < 1
    assert policy.seen


def test_a_policy_may_leave_a_prompt_to_dense_attention(model, batch, generate):
    plain, policy = generate(model, batch), Blocks(dense_below=71)
    with kvdock.attach(model, [policy]):
        assert generate(model, batch) == plain
    assert {length for *_, length in policy.seen} == {97}


def test_the_backend_is_named_for_sparse_attention(model):
    policy = Blocks()
    with kvdock.attach(model, [policy], backend="reference") as dock:
        assert (policy.kernel.name, dock.plan.backend.name) == ("reference", "reference")
    with kvdock.attach(model, [policy]) as dock:
        assert (policy.kernel.name, dock.plan.backend.name) == ("reference", "sdpa")
    with pytest.raises(UnsupportedError, match="'triton' is not usable here"):
        kvdock.attach(model, [policy], backend="triton")
    with pytest.raises(UnsupportedError, match="unknown attention backend 'fast'"):
        kvdock.attach(model, [Unbound()], backend="fast")
