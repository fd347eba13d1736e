"""The storage against float64 over zero-filled keys, through prompts, steps, turns and beams."""

import pytest
import torch

from kvdock.policy import AttentionParams
from kvdock.storage import RowGroup
from kvdock.storage_policy import StoreShape
from kvdock_think.options import ThinKOptions
from kvdock_think.policy import ThinKPolicy
from kvdock_think.storage import ThinKStorage

from . import oracle


class Run:
    """One storage next to the full keys and values that its rows have seen."""

    def __init__(
        self, lengths, *, head_dim=32, kv_heads=2, group=2, recent=4, block=3, ratio=0.375,
        dtype=torch.float32, ordered=True, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.policy = ThinKPolicy(ThinKOptions(ratio=ratio, recent=recent, block=block))
        self.dims, self.group, self.dtype = (kv_heads, head_dim), group, dtype
        self.prompts, self.storage = list(lengths), self.policy.make_storage()
        kept = self.policy.kept_channels(head_dim)
        self.ordered, self.rows, groups = ordered, [], []
        for row, n in enumerate(lengths):
            key, value = self.draw(1, n), self.draw(1, n)
            channels = torch.rand(1, kv_heads, head_dim).topk(kept).indices.sort().values
            self.rows.append((key, value, channels[0]))
            groups.append(self.entries(row, key, value, 0, channels))
        self.storage.fill(groups, max(lengths), ordered=ordered)

    def draw(self, rows, n):
        heads, dim = self.dims
        return torch.randn(rows, heads, n, dim).to(self.dtype)

    def entries(self, row, key, value, first, channels=None):
        position = torch.arange(first, first + key.shape[2]) * (1 if self.ordered else 2)
        return RowGroup((row,), key, value, position.expand(1, self.dims[0], -1), channels=channels)

    @property
    def live(self):
        return [key.shape[2] for key, _, _ in self.rows]

    def see(self, row, key, value):
        had_key, had_value, channels = self.rows[row]
        self.rows[row] = (torch.cat([had_key, key], 2), torch.cat([had_value, value], 2), channels)

    def step(self, count=1):
        for _ in range(count):
            key, value = self.draw(len(self.rows), 1), self.draw(len(self.rows), 1)
            at = self.live
            for row in range(len(self.rows)):
                self.see(row, key[row : row + 1], value[row : row + 1])
            self.storage.append_step(key, value, at, max(self.live) + 5)

    def turn(self, *lengths):
        groups = []
        for row, n in enumerate(lengths):
            key, value = self.draw(1, n), self.draw(1, n)
            groups.append(self.entries(row, key, value, self.live[row]))
            self.see(row, key, value)
        self.storage.append(groups, max(self.live))

    def filled(self, row):
        key, _, channels = self.rows[row]
        start = self.whole_from(row)
        return oracle.zero_filled(key[0], channels, start)

    def whole_from(self, row):
        options = self.policy.options
        return oracle.whole_from(self.prompts[row], self.live[row], options.recent, options.block)

    def check(self, queries=3, limit=1e-5):
        """Compare a step, many queries of all rows and of one, and the rows themselves."""
        heads, dim = self.dims
        query = torch.randn(len(self.rows), heads * self.group, queries, dim).to(self.dtype)
        params = AttentionParams(dim**-0.5)
        many, level = self.storage.attend_past(query, tuple(range(len(self.rows))), params)
        step = self.storage.attend_step(query[:, :, :1], params)
        assert step.shape == (len(self.rows), 1, heads * self.group, dim)
        assert step.dtype == self.dtype and many.dtype == level.dtype == torch.float32
        for row, (_, value, _) in enumerate(self.rows):
            exact, lse = oracle.attend(query[row], self.filled(row), value[0], params.scaling)
            one, lone = self.storage.attend_past(query[row : row + 1], (row,), params)
            for found in (many[row], one[0]):
                assert (found.double() - exact).abs().max() <= limit
            assert (level[row].double() - lse).abs().max() <= limit
            assert (lone[0].double() - lse).abs().max() <= limit
            assert (step[row, 0].double() - exact[:, 0]).abs().max() <= max(limit, 1e-5)
            held = self.storage.row(row)
            assert torch.equal(held.keys[0].double(), self.filled(row))
            assert torch.equal(held.values, value)
        assert self.storage.live == self.live
        tensors = self.storage.tensors().values()
        assert self.storage.nbytes + self.storage.state_nbytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 4])
def test_a_prompt_and_steps(head_dim, group):
    run = Run([21], head_dim=head_dim, group=group)
    run.check()
    run.step(9)
    run.check()


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("recent", [0, 4])
def test_prompts_around_the_recent_tokens(prompt, recent):
    run = Run([prompt], recent=recent)
    assert run.storage.held.start == [max(prompt - recent, 0)]
    run.check()
    for _ in range(8):
        run.step()
        run.check(queries=1)


def test_unequal_rows_and_a_second_turn():
    run = Run([19, 2, 7])
    run.check()
    run.step(2)
    run.check()
    run.turn(0, 11, 1)
    run.check()
    run.step(4)
    run.check()
    assert not run.storage.even


def test_a_block_becomes_narrow_when_one_more_token_comes_and_not_before():
    run = Run([20], recent=4, block=128, head_dim=16)
    run.step(128)
    assert run.storage.held.start == [16]
    assert run.storage.held.rest.shape[2] == 132
    run.step()
    assert run.storage.held.start == [144]
    run.check(queries=1)


def test_a_turn_stores_what_steps_would():
    turn, steps = Run([9, 5]), Run([9, 5])
    torch.manual_seed(3)
    steps.step(8)
    torch.manual_seed(3)
    new = [(turn.draw(2, 1), turn.draw(2, 1)) for _ in range(8)]
    key, value = (torch.cat(part, dim=2) for part in zip(*new, strict=True))
    groups = [turn.entries(r, key[r : r + 1], value[r : r + 1], n) for r, n in enumerate((9, 5))]
    turn.storage.append(groups, 20)
    assert turn.storage.held.start == steps.storage.held.start
    for row in range(2):
        one, other = turn.storage.row(row), steps.storage.row(row)
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.mark.parametrize("lengths", [[12, 12, 12], [12, 3, 8]])
def test_rows_are_reordered_repeated_and_dropped(lengths):
    run = Run(lengths)
    run.step(2)
    order = [2, 0, 0, 1]
    run.storage.select_rows(torch.tensor(order), order)
    run.rows, run.prompts = [run.rows[r] for r in order], [run.prompts[r] for r in order]
    run.check()
    run.step(5)
    run.check()


def test_the_scale_is_that_of_the_whole_head():
    run = Run([30], recent=0)
    key, value, channels = run.rows[0]
    query = torch.randn(1, 4, 1, 32)
    found = run.storage.attend_step(query, AttentionParams(32**-0.5))[0, 0].double()
    filled = oracle.zero_filled(key[0], channels, 30)
    right = oracle.attend(query[0], filled, value[0], 32**-0.5)[0][:, 0]
    wrong = oracle.attend(query[0], filled, value[0], 24**-0.5)[0][:, 0]
    assert (found - right).abs().max() < 1e-5 < 1e-2 < (found - wrong).abs().max()


def test_dropping_zero_channels_changes_nothing():
    torch.manual_seed(4)
    query, key, value = (
        torch.randn(1, 4, 1, 128),
        torch.randn(1, 2, 50, 128),
        torch.randn(1, 2, 50, 128),
    )
    key[..., torch.randperm(128)[:48]] = 0
    policy = ThinKPolicy(ThinKOptions())
    view = RowGroup((0,), key, value, torch.arange(50).expand(1, 2, 50))
    channels = (key.square().sum(2) > 0).nonzero()[:, 2].view(1, 2, 80)
    storage = policy.make_storage()
    storage.fill([RowGroup((0,), key, value, view.positions, channels=channels)], 50, ordered=True)
    found = storage.attend_step(query, AttentionParams(128**-0.5))[0, 0].double()
    exact = oracle.attend(query[0], key[0], value[0], 128**-0.5)[0][:, 0]
    assert (found - exact).abs().max() < 1e-3


def test_grouped_queries_equal_repeated_heads():
    torch.manual_seed(6)
    key, value = (torch.randn(1, 2, 40, 32) for _ in range(2))
    channels = torch.rand(1, 2, 32).topk(16).indices.sort().values
    query, params = torch.randn(1, 6, 5, 32), AttentionParams(32**-0.5)
    found = []
    for times in (1, 3):
        heads = [x.repeat_interleave(times, dim=1) for x in (key, value, channels)]
        storage = ThinKPolicy(ThinKOptions(ratio=0.5, recent=4)).make_storage()
        positions = torch.arange(40).expand(1, 2 * times, 40)
        group = RowGroup((0,), heads[0], heads[1], positions, channels=heads[2])
        storage.fill([group], 40, ordered=True)
        found.append(storage.attend_past(query, (0,), params))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    run = Run([40, 17], head_dim=128, dtype=dtype)
    run.step(3)
    run.check(limit=2e-3 if dtype == torch.float16 else 2e-2)


def test_pruning_commutes_with_quantisation_per_channel():
    torch.manual_seed(5)
    keys = torch.randn(1, 2, 32, 16)
    index = torch.rand(1, 2, 16).topk(8).indices.sort().values[:, :, None].expand(1, 2, 32, 8)

    def quantised(states):
        low, high = states.aminmax(dim=2, keepdim=True)
        step = (high - low) / 3
        return ((states - low) / step).round() * step + low

    assert torch.equal(quantised(keys).gather(3, index), quantised(keys.gather(3, index)))


@pytest.mark.parametrize(("ratio", "kept", "paper"), [(0.375, 80, 0.814), (0.5, 64, 0.752)])
def test_bytes_are_those_of_the_formula(ratio, kept, paper):
    policy, n = ThinKPolicy(ThinKOptions(ratio=ratio)), 4096
    storage = policy.make_storage()
    key, value = (torch.zeros(1, 2, n, 128, dtype=torch.float16) for _ in range(2))
    channels = torch.arange(kept).expand(1, 2, kept)
    group = RowGroup((0,), key, value, torch.arange(n).expand(1, 2, n), channels=channels)
    storage.fill([group], n, ordered=True)
    shape = StoreShape.of(key, value, batch=1, channels=channels, ordered=True)
    assert storage.nbytes == policy.predicted_nbytes(shape, n)
    assert storage.nbytes == 2 * 2 * (n * (kept + 128) + 160 * (128 - kept))
    share = storage.nbytes / (key.nbytes + value.nbytes)
    exact = ((n - 32) * kept + 32 * 128 + n * 128) / (2 * n * 128)
    assert abs(exact - paper) < 6e-4 and exact <= share < exact * 1.02
    if ratio == 0.5:
        assert 1 - share > 0.24
    storage.append_step(key[:, :, :1], value[:, :, :1], [n], n + 256)
    assert storage.nbytes == policy.predicted_nbytes(shape, n + 256)


def test_a_small_ring_grows_with_the_room():
    run = Run([6, 3], recent=40, block=8)
    assert run.storage.held.rest.shape[2] == 6
    run.step(60)
    assert run.storage.held.rest.shape[2] == 48
    run.check()


def test_positions_of_evicted_prompts_are_kept():
    run = Run([9, 4], ordered=False)
    run.storage.append_step(run.draw(2, 1), run.draw(2, 1), [18, 8], 12)
    kept = run.storage.kept_positions()
    assert kept.shape == (2, 2, 10)
    assert kept[0, 0].tolist() == [*range(0, 18, 2), 18]
    assert kept[1, 1].tolist() == [*range(0, 8, 2), 8, *[-1] * 5]
    assert run.storage.row(1).positions[0, 0].tolist() == [*range(0, 8, 2), 8]
    assert ThinKStorage(1, 1).empty and not run.storage.empty
