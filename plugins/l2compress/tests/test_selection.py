"""What L2Compress chooses on hand-made inputs, and what stays true of it."""

import pytest
import torch

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_l2compress.options import L2CompressOptions
from kvdock_l2compress.policy import L2CompressPolicy


def drive(budget, layers=1, **options):
    options.setdefault("skip_layers", ())
    return LayerDriver(L2CompressPolicy(L2CompressOptions(**options)), budget, layers)


def choose(k, slots, **options):
    """Return the kept positions of every row and head of one layer."""
    driver = drive(slots, **options)
    driver.prompt((k, k, k))
    return driver.kept()


def keys(seed=0, rows=1, kv_heads=2, columns=80):
    return random_states(seed, rows, kv_heads, 1, columns, 64)[1]


def test_the_lowest_norms_stay():
    k = torch.ones(1, 1, 6, 64) * torch.tensor([5.0, 1, 4, 2, 6, 3])[:, None]
    assert choose(k, 3) == [[[1, 3, 5]]]


def test_equal_norms_go_to_the_lower_position():
    assert choose(torch.ones(1, 2, 30, 64), 7) == [[[*range(7)]] * 2]


def test_zero_keys_are_the_lowest_of_all():
    k = torch.ones(1, 1, 20, 64)
    k[:, :, [4, 11]] = 0
    assert choose(k, 3) == [[[0, 4, 11]]]


def test_recent_entries_stay_whatever_their_norm():
    k = torch.ones(1, 1, 20, 64)
    k[:, :, -4:] = 100
    assert choose(k, 6) == [[[*range(6)]]]
    assert choose(k, 6, recent=4) == [[[0, 1, 16, 17, 18, 19]]]


def test_recent_does_not_outgrow_a_share():
    k = torch.ones(1, 1, 20, 64)
    assert choose(k, "15%", recent=8) == [[[17, 18, 19]]]


def test_scale_does_not_matter():
    k = keys()
    assert choose(k * 4, 20) == choose(k, 20)


def test_rotation_does_not_matter():
    """RoPE turns pairs of channels, so it may come before or after the norm."""
    k = keys().double()
    angle = torch.arange(80.0, dtype=torch.float64)[:, None] * 10000 ** -torch.linspace(0, 1, 32)
    left, right = k[..., :32], k[..., 32:]
    turned = torch.cat(
        [left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], dim=-1
    )
    assert choose(turned.float(), 20) == choose(k.float(), 20)


def test_half_precision_norms_do_not_tie():
    """Norms of bfloat16 keys are compared in float32: rounded to bfloat16 most would tie."""
    k = keys(columns=2000).bfloat16()
    rounded = torch.linalg.vector_norm(k.float(), dim=-1).bfloat16()
    assert rounded.unique().numel() < 0.05 * rounded.numel()
    order = torch.linalg.vector_norm(k.double(), dim=-1).argsort(dim=-1)[..., :500]
    assert choose(k, 500) == order.sort(dim=-1).values.tolist()


def test_padding_and_neighbours_do_not_change_a_bit():
    q, k, v = random_states(3, 3, 2, 2, 90, 96)
    lengths = [90, 61, 40]
    batch = drive(16)
    batch.prompt((q, k, v), lengths=lengths)
    for row, length in enumerate(lengths):
        alone = drive(16)
        alone.prompt(tuple(x[row : row + 1, :, -length:] for x in (q, k, v)))
        assert batch.kept()[row] == alone.kept()[0]


def test_skipped_layers_keep_every_byte():
    states = random_states(1, 2, 2, 2, 50, 64)
    driver = drive(10, layers=2, skip_layers=(0,))
    driver.prompt(states, states)
    whole, short = driver.store(0).storage, driver.store(1).storage
    assert torch.equal(whole.table["key"], states[1])
    assert torch.equal(whole.table["value"], states[2])
    assert short.live == [10, 10]
    assert whole.nbytes == 5 * short.nbytes


def test_only_skipped_layers_take_the_whole_prompt():
    policy = L2CompressPolicy(L2CompressOptions())
    assert policy.layer_slots(131072, 2048, 4) == [131072, 131072, 2048, 2048]


def turns(lengths):
    return [random_states(seed, 1, 2, 2, length, 64) for seed, length in enumerate(lengths)]


def agrees(driver):
    """Say whether every layer holds what the formula predicts."""
    return all(store.storage.live == store.ledger.live for store in driver.session.stores)


@pytest.mark.parametrize("lengths", [(60, 30), (8, 70), (16, 1), (60, 20, 20)])
def test_recompressing_equals_one_prompt(lengths):
    """Scores belong to single keys, so the best of the best are the best of all."""
    later, once = drive(16, recompress=True), drive(16)
    prompts = turns(lengths)
    for prompt in prompts:
        later.prompt(prompt)
    once.prompt(tuple(torch.cat(parts, dim=2) for parts in zip(*prompts, strict=True)))
    assert later.kept() == once.kept()
    assert later.store().storage.live == [16]
    assert agrees(later)


@pytest.mark.parametrize("lengths", [(60, 30), (8, 70), (8, 4, 30)])
def test_skipped_layers_stay_whole_in_later_turns(lengths):
    driver = drive(16, layers=2, skip_layers=(0,), recompress=True)
    for prompt in turns(lengths):
        driver.prompt(prompt, prompt)
    assert driver.kept(0) == [[[*range(sum(lengths))]] * 2]
    assert driver.store(1).storage.live == [16]
    assert agrees(driver)


def test_tokens_between_two_turns_are_compressed_with_the_second():
    driver = drive(16, layers=2, skip_layers=(0,), recompress=True)
    first, second = turns((60, 30))
    answer = random_states(9, 1, 2, 2, 5, 64)
    driver.prompt(first, first)
    for t in range(5):
        token = tuple(x[:, :, t : t + 1] for x in answer)
        driver.step(token, token)
    assert [store.storage.live for store in driver.session.stores] == [[65], [21]]
    driver.prompt(second, second)
    assert [store.storage.live for store in driver.session.stores] == [[95], [16]]
    assert agrees(driver)


def test_without_recompressing_a_later_turn_is_appended():
    driver = drive(16)
    for prompt in turns((60, 30)):
        driver.prompt(prompt)
    assert driver.store().storage.live == [46]
    assert all(head[16:] == [*range(60, 90)] for head in driver.kept()[0])
    assert agrees(driver)
