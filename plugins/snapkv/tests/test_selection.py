"""What SnapKV chooses on hand-made inputs, and what it refuses."""

import pytest
import torch

from kvdock.budget import Budget
from kvdock.errors import BudgetError, OptionError, UnsupportedError
from kvdock.kernels import window_scores
from kvdock.policy import AttentionParams
from kvdock_snapkv.options import SnapKVOptions
from kvdock_snapkv.policy import SnapKVPolicy

from . import oracle
from .harness import make_layer, states


def one_layer(q, k, v, slots, *, params=None, **options):
    layer = make_layer(slots, params=params, **options)
    layer.prompt((q, k, v))
    return layer.kept()


def hot_key(columns, hot, head_dim=64):
    """Return states whose every query attends to key ``hot`` and to nothing else in particular."""
    q = torch.zeros(1, 2, columns, head_dim)
    q[..., 0] = 8.0
    k = torch.zeros(1, 1, columns, head_dim)
    k[0, 0, hot, 0] = 8.0
    return q, k, torch.randn(1, 1, columns, head_dim)


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_max_pooling_keeps_a_plateau_around_one_hot_key(kernel):
    window, hot, half = 4, 40, kernel // 2
    (chosen,) = one_layer(*hot_key(80, hot), window + kernel, window=window, kernel=kernel)[0]
    assert chosen == [*range(hot - half, hot + half + 1), *range(76, 80)]


def test_a_plateau_cut_by_the_budget_keeps_its_lowest_positions():
    (chosen,) = one_layer(*hot_key(80, 40), 4 + 5, window=4, kernel=7)[0]
    assert chosen == [37, 38, 39, 40, 41, 76, 77, 78, 79]


@pytest.mark.parametrize(("kernel", "pooling"), [(1, "max"), (7, "max"), (1, "avg")])
def test_equal_scores_go_to_the_lowest_positions(kernel, pooling):
    q, _, v = states(0, kv_heads=2, group=2, columns=50, head_dim=64)
    k = torch.zeros_like(v)
    rows = one_layer(q, k, v, 20, window=6, kernel=kernel, pooling=pooling)
    assert rows == [[[*range(14), *range(44, 50)]] * 2]


def test_avg_pooling_counts_the_zeros_beyond_the_ends():
    q, _, v = states(0, kv_heads=1, group=1, columns=50, head_dim=64)
    k = torch.zeros_like(v)  # equal votes: the two columns at each end are damped
    ((chosen,),) = one_layer(q, k, v, 46, window=6, kernel=5, pooling="avg")
    assert chosen == [*range(2, 42), *range(44, 50)]
    ((chosen,),) = one_layer(q, k, v, 47, window=6, kernel=5, pooling="avg")
    assert chosen == [*range(1, 42), *range(44, 50)]


def test_without_pooling_the_choice_follows_a_permutation_of_the_prefix():
    columns, window = 60, 8
    prefix = columns - window
    q, k, v = states(3, kv_heads=2, group=3, columns=columns, head_dim=64)
    order = torch.randperm(prefix, generator=torch.Generator().manual_seed(1))
    moved = k.clone()
    moved[:, :, :prefix] = k[:, :, order]  # column i now holds what column order[i] held
    (before,) = one_layer(q, k, v, 24, window=window, kernel=1)
    (after,) = one_layer(q, moved, v, 24, window=window, kernel=1)
    for old, new in zip(before, after, strict=True):
        assert sorted(order[p].item() for p in new if p < prefix) == [p for p in old if p < prefix]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_tiny_allowances_keep_the_last_token(slots):
    q, k, v = states(5, kv_heads=1, group=2, columns=30, head_dim=64)
    ((chosen,),) = one_layer(q, k, v, f"{slots * 2 * 64 * 4}B", window=32, kernel=1)
    a = oracle.probabilities(q[0], k[0], scaling=64**-0.5)
    wanted, _ = oracle.select(a, kv_heads=1, slots=slots, window=32, kernel=1, pooling="max")
    assert len(chosen) == slots
    assert chosen[-1] == 29
    assert chosen == wanted[0]


def test_duplicated_query_heads_choose_as_one_head():
    q, k, v = states(6, kv_heads=2, group=1, columns=70, head_dim=64)
    assert one_layer(q, k, v, 20, window=5) == one_layer(
        q.repeat_interleave(4, dim=1), k, v, 20, window=5
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("learned_sinks", [False, True])
def test_soft_capping_and_learned_sinks_enter_the_votes(softcap, learned_sinks):
    q, k, v = states(7, kv_heads=2, group=2, columns=90, head_dim=64, sharpness=3.0)
    sinks = torch.tensor([0.5, 4.0, -2.0, 1.0]) if learned_sinks else None
    params = AttentionParams(0.25, softcap, sinks)
    a = oracle.probabilities(q[0], k[0], scaling=0.25, softcap=softcap, sinks=sinks)
    wanted, sure = oracle.select(a, kv_heads=2, slots=30, window=8, kernel=1, pooling="max")
    assert sure
    assert one_layer(q, k, v, 30, params=params, window=8, kernel=1) == [wanted]


def test_soft_capping_matters_to_that_choice():
    q, k, v = states(7, kv_heads=2, group=2, columns=90, head_dim=64, sharpness=3.0)
    plain, capped = AttentionParams(0.25), AttentionParams(0.25, 5.0)
    options = {"window": 8, "kernel": 1}
    assert one_layer(q, k, v, 30, params=plain, **options) != one_layer(
        q, k, v, 30, params=capped, **options
    )


def test_the_same_input_gives_the_same_choice():
    q, k, v = states(8, rows=2, kv_heads=2, group=4, columns=200, head_dim=64)
    first = one_layer(q, k, v, 64, window=16)
    assert all(one_layer(q, k, v, 64, window=16) == first for _ in range(3))


def test_bfloat16_keeps_what_float32_keeps():
    q, k, v = states(9, rows=2, kv_heads=4, group=4, columns=512, head_dim=64)
    whole = one_layer(q, k, v, 128, window=32)
    half = one_layer(q.bfloat16(), k.bfloat16(), v.bfloat16(), 128, window=32)
    both = zip(sum(whole, []), sum(half, []), strict=True)
    common = [len(set(one) & set(other)) for one, other in both]
    assert sum(common) >= 0.95 * 128 * len(common)


@pytest.mark.parametrize("block_bytes", [1, 30_000, 2**40])
def test_votes_do_not_depend_on_the_block_size(block_bytes, monkeypatch):
    q, k, _ = states(10, rows=2, kv_heads=4, group=2, columns=120, head_dim=64)
    params = AttentionParams(64**-0.5, 20.0, torch.randn(8))
    whole = window_scores.window_votes(q[:, :, -16:], k, params)
    monkeypatch.setattr(window_scores, "BLOCK_BYTES", block_bytes)
    blocks = list(window_scores.window_probabilities(q[:, :, -16:], k, params))
    assert len(blocks) == {1: 4, 30_000: 4, 2**40: 1}[block_bytes]
    assert torch.allclose(
        window_scores.window_votes(q[:, :, -16:], k, params), whole, rtol=1e-6, atol=0
    )


def test_window_probabilities_are_rows_of_the_full_attention():
    q, k, _ = states(11, kv_heads=2, group=3, columns=40, head_dim=64)
    parts = window_scores.window_probabilities(q[:, :, -9:], k, AttentionParams(64**-0.5))
    found = torch.cat([block for _, block in parts], dim=1)[0].flatten(0, 1)
    full = oracle.probabilities(q[0], k[0], scaling=64**-0.5)[:, -9:]
    assert torch.allclose(found.double(), full, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.sum(-1), torch.ones(6, 9))


@pytest.mark.parametrize("recompress", [False, True])
def test_a_second_turn(recompress):
    """Off: the turn is appended whole. On: its window chooses among everything the cache holds."""
    slots, window, head_dim = 24, 6, 64
    shape = {"kv_heads": 2, "group": 2, "head_dim": head_dim}
    q, k, v = states(12, columns=60, **shape)
    layer = make_layer(slots, window=window, kernel=5, recompress=recompress)
    layer.prompt((q, k, v))
    first = layer.kept()[0]
    q1, k1, v1 = states(13, columns=3, **shape)
    for i in range(3):
        layer.step((q1[:, :, i : i + 1], k1[:, :, i : i + 1], v1[:, :, i : i + 1]))
    held = [[*head, 60, 61, 62] for head in first]
    assert layer.kept()[0] == held  # nothing is dropped while decoding
    q2, k2, v2 = states(14, columns=10, **shape)
    layer.prompt((q2, k2, v2), chunks=(4, 5, 1))
    held = [[*head, *range(63, 73)] for head in held]
    if not recompress:
        assert layer.kept()[0] == held
        return
    every_key = torch.cat([k, k1, k2], dim=2)[0]
    for head, candidates in enumerate(held):
        a = oracle.probabilities(
            q2[0, 2 * head : 2 * head + 2],
            every_key[head, candidates][None],
            scaling=head_dim**-0.5,
        )
        (chosen,), sure = oracle.select(
            a, kv_heads=1, slots=slots, window=window, kernel=5, pooling="max"
        )
        assert sure
        assert layer.kept()[0][head] == [candidates[i] for i in chosen]
    assert layer.store().storage.live == [slots]


def test_a_second_turn_shorter_than_the_window_votes_with_what_it_has():
    shape = {"kv_heads": 1, "group": 2, "head_dim": 64}
    q, k, v = states(15, columns=60, **shape)
    layer = make_layer(20, window=8, kernel=1, recompress=True)
    layer.prompt((q, k, v))
    ((first,),) = layer.kept()
    q2, k2, v2 = states(16, columns=2, **shape)
    layer.prompt((q2, k2, v2))
    candidates = [*first, 60, 61]
    keys = torch.cat([k, k2], dim=2)[0][:, candidates]
    a = oracle.probabilities(q2[0], keys, scaling=64**-0.5)
    (wanted,), sure = oracle.select(a, kv_heads=1, slots=20, window=8, kernel=1, pooling="max")
    assert sure
    assert layer.kept() == [[[candidates[i] for i in wanted]]]


def test_a_later_turn_in_which_a_row_brings_nothing_is_refused():
    layer = make_layer(20, window=8, recompress=True)
    layer.prompt(states(17, rows=2))
    layer.step(states(18, rows=2, columns=1))
    with pytest.raises(UnsupportedError, match=r"row 1.*recompress=False"):
        layer.prompt(states(19, rows=2, columns=4), lengths=(4, 0))


@pytest.mark.parametrize("kernel", [2, 6])
def test_an_even_kernel_is_refused(kernel):
    with pytest.raises(OptionError, match=f"kernel.*{kernel}.*odd"):
        SnapKVOptions(kernel=kernel)


@pytest.mark.parametrize(
    ("name", "value"), [("window", 0), ("kernel", 0), ("pooling", "sum"), ("recompress", 1)]
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        SnapKVOptions(**{name: value})


@pytest.mark.parametrize("slots", [1, 31, 32])
def test_a_budget_the_window_fills_is_refused(slots):
    policy = SnapKVPolicy(SnapKVOptions())
    with pytest.raises(BudgetError, match="window"):
        policy.check_budget(Budget.parse(slots))
    policy.check_budget(Budget.parse(33))
    policy.check_budget(Budget.parse("1%"))  # known only with the prompt: the window shrinks
