"""Both ways of numbering, against naive float64 oracles that rotate every key anew."""

import copy

import pytest
import torch

from kvdock.errors import UnsupportedError

from .harness import Batch, attach, held, make_layer, make_model, rotation, tokens
from .oracle import NaiveLayer, NaiveModel, kept, rope

pytestmark = pytest.mark.versionless

BOTH = pytest.mark.parametrize("positions", ["cache", "original"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_the_core_rotates_cached_keys_as_the_formula_says():
    raw, start = torch.randn(2, 5, 16), [0, 1, 2, 3, 70]
    delta = torch.tensor([[5, 0, 1, 300, 2]])
    cached = rope(raw, start)[None].float()
    turned = rotation(16)(cached, delta, 0)[0]
    end = [p + d for p, d in zip(start, delta[0].tolist(), strict=True)]
    assert torch.allclose(turned.double(), rope(raw, end), rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("sinks", [0, 4, 9])
@pytest.mark.parametrize(("prompt", "slots"), [(40, 12), (6, 12), (12, 12), (3, 10)])
def test_one_layer_by_hand(positions, sinks, prompt, slots):
    """Raw states in, the same outputs out: at each of 3C steps C + 1 entries are attended."""
    head_dim, group = 16, 2
    layer = make_layer(slots, rotate=rotation(head_dim), sinks=sinks, positions=positions)
    naive = NaiveLayer(slots, sinks, positions, rope)
    generator = torch.Generator().manual_seed(prompt)

    def draw(count):
        shape = (count, head_dim)
        q, k, v = (torch.randn(n, *shape, generator=generator) * 2 for n in (2 * group, 2, 2))
        return q, k, v

    def compare(feed, count, seen):
        q, k, v = draw(count)
        at = range(seen, seen + count)
        (output,) = feed((rope(q, at)[None].float(), rope(k, at)[None].float(), v[None]))
        wanted = naive.forward(q.double(), k.double(), v.double(), head_dim**-0.5)
        found = output[0].transpose(0, 1).double()
        assert torch.allclose(found, wanted, **CLOSE), (found - wanted).abs().max()

    compare(layer.prompt, prompt, 0)
    for seen in range(prompt, prompt + 3 * slots):
        assert held(layer) == [naive.held]
        compare(layer.step, 1, seen)


def run_both(model, slots, positions, *, sinks=4, prompt=30, turns=(1,) * 16):
    """Compare a docked model with the naive one: a prompt, then ``turns`` of so many tokens."""
    naive = NaiveModel(model, slots, sinks, positions)
    with attach(model, slots, sinks=sinks, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        for index, count in enumerate((prompt, *turns)):
            ids = tokens(count, seed=index)
            (found,), wanted = batch.feed([ids]), naive(ids)
            error = (found.double() - wanted).abs().max()
            assert torch.allclose(found.double(), wanted, **CLOSE), f"feed {index}: {error:.1e}"
            assert held(dock) == [naive.layers[0].held]


@BOTH
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "glm4"])
def test_every_family(family, positions):
    run_both(make_model(family, layers=2), 12, positions)


@BOTH
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_every_static_rope(rope_type, positions):
    run_both(make_model(rope=rope_type), 12, positions, turns=(1,) * 20)


@BOTH
@pytest.mark.parametrize("sinks", [0, 1])
def test_few_sinks(sinks, positions):
    run_both(make_model(), 6, positions, sinks=sinks, turns=(1,) * 18)


@BOTH
def test_later_turns(positions):
    run_both(make_model(layers=2), 12, positions, turns=(1, 1, 7, 1, 20, 1, 2, 1, 1))


@BOTH
def test_later_turns_that_start_before_anything_was_evicted(positions):
    run_both(make_model(layers=2), 12, positions, prompt=3, turns=(1, 4, 9, 1, 5, 1))


def test_the_two_numberings_differ_once_something_is_evicted():
    results = []
    for positions in ("cache", "original"):
        model = make_model()
        with attach(model, 12, positions=positions) as dock:
            batch = Batch(model, dock.new_cache())
            batch.feed([tokens(30)])
            results.append(batch.feed([tokens(1)])[0])
    assert (results[0] - results[1]).abs().max() > 0.01


@BOTH
def test_a_ragged_batch_equals_its_rows(positions):
    """Rows start to evict at different steps; each must still be its own naive run."""
    model, slots, lengths = make_model(layers=2), 8, [30, 5, 9, 2]
    naive = [NaiveModel(model, slots, 4, positions) for _ in lengths]
    with attach(model, slots, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        for feed, counts in enumerate([lengths, *[[1] * 4] * 12, [3, 1, 6, 2], *[[1] * 4] * 3]):
            rows = [tokens(n, seed=10 * feed + i) for i, n in enumerate(counts)]
            found = batch.feed(rows)
            for row, one, by_hand in zip(rows, found, naive, strict=True):
                assert torch.allclose(one.double(), by_hand(row), **CLOSE), f"feed {feed}"


@BOTH
def test_a_row_that_first_evicts_in_a_later_turn(positions):
    """Its neighbour evicted before, so the cache holds a state for both; every layer must see 0."""
    model, slots = make_model(layers=2), 8
    naive = [NaiveModel(model, slots, 4, positions) for _ in range(2)]
    with attach(model, slots, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        for feed, counts in enumerate([(30, 2), (1, 1), (3, 9), (1, 1), (1, 1)]):
            rows = [tokens(n, seed=10 * feed + i) for i, n in enumerate(counts)]
            for row, one, by_hand in zip(rows, batch.feed(rows), naive, strict=True):
                assert torch.allclose(one.double(), by_hand(row), **CLOSE), f"feed {feed}"


@BOTH
@pytest.mark.parametrize("share", ["5%", "20%"])
def test_a_share_of_fewer_slots_than_sinks(positions, share):
    model, lengths = make_model(), [40, 9]
    slots = [max(1, n * int(share[:-1]) // 100) for n in lengths]
    naive = [NaiveModel(model, c, 7, positions) for c in slots]
    with attach(model, share, sinks=7, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        for feed, counts in enumerate([lengths, *[[1] * 2] * 12]):
            rows = [tokens(n, seed=10 * feed + i) for i, n in enumerate(counts)]
            for row, one, by_hand in zip(rows, batch.feed(rows), naive, strict=True):
                assert torch.allclose(one.double(), by_hand(row), **CLOSE), f"feed {feed}"


@BOTH
@pytest.mark.parametrize("prompt", [30, 4])
def test_reordered_rows_go_on_as_themselves(positions, prompt):
    """What beam search does: rows are permuted, repeated and dropped between steps."""
    model, slots = make_model(layers=2), 8
    plain = copy.deepcopy(model)  # a copy made while docked would carry the dock's overrides
    history = [[tokens(prompt + 3 * i, seed=i)] for i in range(3)]
    with attach(model, slots, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([row[0] for row in history])
        for order in ([2, 0, 1], [1, 1, 0], [0, 2, 2]):
            for _ in range(3):
                new = [tokens(1, seed=len(row) + i) for i, row in enumerate(history)]
                found = batch.feed(new)
                history = [[*row, more] for row, more in zip(history, new, strict=True)]
            for one, row in zip(found, history, strict=True):
                naive = NaiveModel(plain, slots, 4, positions)
                wanted = [naive(part) for part in row][-1]
                assert torch.allclose(one.double(), wanted, **CLOSE)
            dock.cache.reorder_cache(torch.tensor(order))
            batch.mask = batch.mask[order]
            history = [history[i] for i in order]


@BOTH
@pytest.mark.parametrize("prompt", [5, 20])
def test_a_text_within_the_budget_is_the_full_cache(positions, prompt):
    """Up to C tokens nothing is dropped or moved: prefill is bit-identical, tokens are the same."""
    model, ids = make_model(layers=2), tokens(prompt)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {
        "max_new_tokens": 28 - prompt, "do_sample": False,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(**batch, **settings)
    with attach(model, 28, positions=positions) as dock:
        docked = model.generate(**batch, **settings)
        assert held(dock) == [list(range(27))]
    assert torch.equal(docked.sequences, plain.sequences)
    assert torch.equal(docked.logits[0], plain.logits[0])
    for one, other in zip(docked.logits, plain.logits, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@BOTH
def test_bfloat16_sinks_do_not_drift(positions):
    """Sinks are turned from their original keys: the error does not grow with the steps."""
    head_dim, slots = 16, 8
    layer = make_layer(slots, rotate=rotation(head_dim), positions=positions)
    raw = torch.randn(2, 20, head_dim)
    keys = rope(raw, range(20))[None].bfloat16()
    layer.prompt((torch.randn(1, 2, 20, head_dim).bfloat16(), keys, keys))
    for _ in range(200):
        layer.step(tuple(torch.randn(3, 1, 2, 1, head_dim).bfloat16()))
    evicted = 220 - slots if positions == "cache" else 0
    wanted = rope(raw[:, :4], [j + evicted for j in range(4)])
    found = layer.store().storage.row(0).keys[0, :, :4].double()
    assert torch.allclose(found, wanted, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("sinks", [0, 4])
def test_dynamic_rope_is_refused_with_the_way_out(sinks):
    model = make_model(rope="dynamic")
    with pytest.raises(UnsupportedError, match=r"dynamic.*positions='original'"):
        attach(model, 12, sinks=sinks)
    with attach(model, 12, sinks=sinks, positions="original") as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([tokens(20)])
        assert held(dock) == [kept(20, 12, sinks)]
