"""A user who calls the model with `dock.new_cache()` gets what `generate` gives."""

import copy

import pytest
import torch

import kvdock


def continued(model, cache, first, count, mask=None):
    """Decode greedily, token by token, after a prompt whose last logits are ``first``."""
    tokens = [first.argmax(dim=-1)]
    for _ in range(count - 1):
        step = {"input_ids": tokens[-1][:, None]}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            step |= {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        tokens.append(model(**step, past_key_values=cache).logits[:, -1].argmax(dim=-1))
    return torch.stack(tokens, dim=1).tolist()


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_one_forward_then_token_by_token(docked, row, generate):
    cache = docked.new_cache()
    logits = docked.model(**row, past_key_values=cache).logits[:, -1]
    direct = continued(docked.model, cache, logits, 12)
    docked.report()
    assert direct == generate(docked.model, row)


def test_left_padding(docked, batch, generate):
    mask = batch["attention_mask"]
    cache = docked.new_cache()
    logits = docked.model(**batch, position_ids=positions(mask), past_key_values=cache).logits
    assert continued(docked.model, cache, logits[:, -1], 12, mask) == generate(docked.model, batch)
    docked.report()


def test_right_padding(docked, batch, generate):
    lengths = batch["attention_mask"].sum(1)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    for index, n in enumerate(lengths.tolist()):
        ids[index] = ids[index].roll(n)
        mask[index] = mask[index].roll(n)
    cache = docked.new_cache()
    logits = docked.model(
        ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache
    ).logits
    last = logits[torch.arange(3), lengths - 1]
    assert continued(docked.model, cache, last, 12, mask) == generate(docked.model, batch)


@pytest.mark.parametrize("known", ["prompt_length", "end_prefill"])
@pytest.mark.parametrize("size", [1, 30, 96])
def test_manual_chunks(docked, row, generate, known, size):
    cache = docked.new_cache(prompt_length=97 if known == "prompt_length" else 120)
    for part in row["input_ids"].split(size, dim=1):
        assert cache.docked[0].store.open or not cache.get_seq_length()
        logits = docked.model(part, past_key_values=cache).logits[:, -1]
    if known == "end_prefill":
        cache.end_prefill()
        cache.end_prefill()  # a second call does nothing
    assert docked.kept_positions(0).shape[-1] == 48
    assert continued(docked.model, cache, logits, 12) == generate(docked.model, row)
    docked.report()


def test_chunks_of_a_padded_batch(docked, batch, generate):
    mask, cache = batch["attention_mask"], docked.new_cache(prompt_length=97)
    for start in range(0, 97, 25):
        stop = min(start + 25, 97)
        logits = docked.model(
            batch["input_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions(mask)[:, start:stop],
            past_key_values=cache,
        ).logits[:, -1]
    assert continued(docked.model, cache, logits, 12, mask) == generate(docked.model, batch)
    docked.report()


def test_two_caches_on_one_model_stay_apart(docked, row, generate):
    model, other = docked.model, {"input_ids": row["input_ids"].flip(1)}
    expected = generate(model, row), generate(model, other)
    caches, tokens = (docked.new_cache(), docked.new_cache()), ([], [])
    inputs = [row["input_ids"], other["input_ids"]]
    for _ in range(12):
        for index in (0, 1):
            logits = model(inputs[index], past_key_values=caches[index]).logits[:, -1]
            inputs[index] = logits.argmax(dim=-1)[:, None]
            tokens[index].append(int(inputs[index]))
    assert ([tokens[0]], [tokens[1]]) == expected


def test_a_copy_goes_on_alike_and_alone(docked, row):
    cache = docked.new_cache()
    logits = docked.model(**row, past_key_values=cache).logits[:, -1]
    twin = copy.deepcopy(cache)
    assert twin.plan is cache.plan and twin.docked[0].session is twin.session
    left = continued(docked.model, cache, logits, 12)
    assert twin.get_seq_length() == 97
    assert continued(docked.model, twin, logits, 12) == left
    for mine, its in zip(cache.docked, twin.docked, strict=True):
        for name, tensor in mine.store.storage.table.items():
            assert torch.equal(tensor, its.store.storage.table[name])
            assert tensor.data_ptr() != its.store.storage.table[name].data_ptr()


def test_a_cache_used_again_after_reset(docked, row, generate):
    cache = docked.new_cache()
    expected = generate(docked.model, row)
    docked.model(row["input_ids"][:, :60], past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(docked.model, row, past_key_values=cache) == expected
    cache.reset()
    logits = docked.model(**row, past_key_values=cache).logits[:, -1]
    assert continued(docked.model, cache, logits, 12) == expected
    docked.report()


def test_rows_picked_and_repeated(docked, batch, generate):
    mask, expected = batch["attention_mask"], generate(docked.model, batch)
    for rows in ([2, 0], [1], [0, 0, 2, 1]):
        cache = docked.new_cache()
        logits = docked.model(**batch, position_ids=positions(mask), past_key_values=cache).logits[
            :, -1
        ]
        cache.batch_select_indices(torch.tensor(rows))
        direct = continued(docked.model, cache, logits[rows], 12, mask[rows])
        assert direct == [expected[row] for row in rows]
    cache = docked.new_cache()
    logits = docked.model(**batch, position_ids=positions(mask), past_key_values=cache).logits
    cache.batch_repeat_interleave(2)
    last, twice = (x.repeat_interleave(2, 0) for x in (logits[:, -1], mask))
    direct = continued(docked.model, cache, last, 12, twice)
    assert direct == [row for row in expected for _ in (0, 1)]
    docked.report()


def test_attach_as_a_plain_call(model, policy, row, generate):
    dock = kvdock.attach(model, [policy], budget=48)
    inside = generate(model, row)
    dock.detach()
    with kvdock.attach(model, [policy], budget=48):
        assert generate(model, row) == inside
    assert "generate" not in vars(model)


def test_a_plugin_can_choose_the_kernel_unless_the_user_does(model, policies):
    asked = []

    class Chooser:
        @kvdock.hookimpl
        def kvdock_select_kernel(self, op, device, dtype):
            asked.append((op, device, dtype))
            return "reference"

    host, plugin = kvdock.default_host(), Chooser()
    host.register(plugin)
    try:
        with kvdock.attach(model, [policies.Votes()], budget=16) as dock:
            assert dock.plan.backend.name == "reference"
        with kvdock.attach(model, [policies.Votes()], budget=16, backend="sdpa") as dock:
            assert dock.plan.backend.name == "sdpa"
    finally:
        host.unregister(plugin)
    assert asked == [("prefill", "cpu", "float32")]
