"""A layer's storage: the same bytes however tokens come, and attention against float64."""

import pytest
import torch

from kvdock.storage_policy import StoreShape
from kvdock_kivi import attention
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.options import KiviOptions
from kvdock_kivi.packed import Packed
from kvdock_kivi.policy import KiviPolicy
from kvdock_kivi.storage import KiviStorage

from . import oracle
from .harness import SMALL, filled, packed_bytes, params, piece, states, streamed


@pytest.mark.parametrize("geometry", [Geometry(2, 32, 32), Geometry(4, 32, 64)], ids=str)
def test_any_chunking_leaves_the_same_bytes(geometry):
    residual = geometry.residual
    tokens = 3 * residual + 17
    q, k, v = states(0, rows=2, tokens=tokens)
    wanted = filled(geometry, k, v)
    for chunks in (
        [("turn", 1), ("steps", tokens - 1)],
        [("turn", residual), ("turn", residual + 1), ("steps", residual + 16)],
        [("turn", residual - 1), ("steps", 2), ("turn", 2 * residual - 1), ("steps", 17)],
        [("turn", 7)] * (tokens // 7) + [("steps", tokens % 7)],
        [("turn", 5), ("steps", residual), ("turn", 1), ("turn", tokens - residual - 6)],
    ):
        found = streamed(geometry, q, k, v, chunks)
        for name, tensor in packed_bytes(wanted).items():
            assert torch.equal(packed_bytes(found)[name], tensor), (name, chunks)
        for row in range(2):
            left, right = found.row(row), wanted.row(row)
            assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)
    assert packed_bytes(wanted)["key_codes"].count_nonzero() > 0


@pytest.mark.parametrize("extra", [-1, 0, 1, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_boundary_lengths_read_as_the_oracle_says(bits, extra):
    geometry = Geometry(bits, 32, 64)
    q, k, v = states(extra + 1, tokens=64 + extra)
    storage = filled(geometry, k, v)
    keys, values = oracle.stored(k[0], v[0], bits, 32, 64)
    row = storage.row(0)
    assert torch.equal(row.keys[0], keys.float()) and torch.equal(row.values[0], values.float())
    output, lse = storage.attend_past(q[:, :, :3], [0], params(k))
    wanted, level = oracle.attend(q[0, :, :3], keys, values, params(k).scaling)
    assert (output[0] - wanted).abs().max() < 1e-5 and (lse[0] - level).abs().max() < 1e-5


def test_a_step_sees_the_window_it_completes_in_full_precision_once():
    q, k, v = states(5, tokens=128)
    storage = streamed(SMALL, q, k, v, [("turn", 100), ("steps", 27)])
    last = slice(127, 128)
    storage.append_step(k[:, :, last], v[:, :, last], [127], 128)
    output = storage.attend_step(q[:, :, last], params(k))
    keys, values = oracle.stored(k[0], v[0], 2, 32, 64, held=1)
    wanted, _ = oracle.attend(q[0, :, last], keys, values, params(k).scaling)
    assert output.shape == (1, 1, 4, 32)
    assert (output[0].transpose(0, 1) - wanted).abs().max() < 1e-5
    packed, _ = oracle.stored(k[0], v[0], 2, 32, 64)
    assert torch.equal(storage.row(0).keys[0], packed.float())
    assert not torch.equal(keys, packed)


def test_rows_of_unequal_length_are_as_alone():
    _, k, v = states(6, rows=3, tokens=150)
    lengths = (150, 64, 20)
    together = KiviStorage(SMALL)
    groups = [piece(k, v, [row], 0, n) for row, n in enumerate(lengths)]
    together.fill(groups, 170, ordered=True)
    alone = []
    for row, n in enumerate(lengths):
        one = KiviStorage(SMALL)
        one.fill([piece(k[row : row + 1], v[row : row + 1], [0], 0, n)], n, ordered=True)
        alone.append(one)
    new = states(7, rows=3, tokens=20)
    for t in range(20):
        step = slice(t, t + 1)
        at = [n + t for n in lengths]
        together.append_step(new[1][:, :, step], new[2][:, :, step], at, 170)
        output = together.attend_step(new[0][:, :, step], params(k))
        for row, one in enumerate(alone):
            states_ = [x[row : row + 1, :, step] for x in new]
            one.append_step(*states_[1:], [at[row]], at[row] + 1)
            single = one.attend_step(states_[0], params(k))
            assert torch.equal(output[row], single[0]), (t, row)
    assert together.live == [170, 84, 40] and not together.even
    for row, one in enumerate(alone):
        assert torch.equal(together.row(row).keys, one.row(0).keys)
    assert together.kept_positions()[2, 0].tolist() == [*range(40), *[-1] * 130]
    # a turn that only some rows bring
    together.append([piece(*new[1:], [1], 0, 9), piece(*new[1:], [0, 2], 0, 0)], 170)
    alone[1].append([piece(new[1][1:2], new[2][1:2], [0], 0, 9)], 93)
    output, lse = together.attend_past(new[0][1:2], [1], params(k))
    single = alone[1].attend_past(new[0][1:2], [0], params(k))
    assert torch.equal(output, single[0]) and torch.equal(lse, single[1])


def test_rows_are_reordered_repeated_and_dropped_with_everything_they_hold():
    q, k, v = states(8, rows=3, tokens=100)
    storage = KiviStorage(SMALL)
    groups = [piece(k, v, [row], 0, n) for row, n in enumerate((100, 70, 90))]
    storage.fill(groups, 110, ordered=False)
    before = [storage.row(row) for row in range(3)]
    storage.select_rows(torch.tensor([2, 2, 0, 1]), [2, 2, 0, 1])
    for row, source in enumerate((2, 2, 0, 1)):
        assert torch.equal(storage.row(row).keys, before[source].keys)
        assert torch.equal(storage.row(row).positions, before[source].positions)
    order = torch.tensor([2, 2, 0, 1])
    step = (k[order, :, :1], v[order, :, :1])
    storage.append_step(*step, [500, 500, 501, 502], 110)
    storage.attend_step(q[order, :, :1], params(k))
    assert storage.live == [91, 91, 101, 71]
    assert storage.kept_positions()[:, 0].max(-1).values.tolist() == [500, 500, 501, 502]


def test_grouped_queries_equal_repeated_heads():
    q, k, v = states(9, kv_heads=2, group=3, tokens=130)
    grouped = filled(SMALL, k, v).attend_past(q, [0], params(k))
    repeated = filled(SMALL, *(x.repeat_interleave(3, 1) for x in (k, v)))
    output, lse = repeated.attend_past(q, [0], params(k))
    assert torch.allclose(grouped[0], output, atol=1e-6)
    assert torch.allclose(grouped[1], lse, atol=1e-6)


def test_a_residual_of_all_tokens_is_the_dense_path():
    q, k, v = states(10, tokens=100)
    storage = filled(Geometry(2, 32, 128), k, v)
    output, lse = storage.attend_past(q, [0], params(k))
    wanted, level = oracle.attend(q[0], k[0], v[0], params(k).scaling)
    assert torch.equal(storage.row(0).keys, k) and torch.equal(storage.row(0).values, v)
    assert (output[0] - wanted).abs().max() < 1e-5 and (lse[0] - level).abs().max() < 1e-5


def test_cutting_channels_and_quantising_commute():
    q, k, v = states(11, rows=2, tokens=150)
    generator = torch.Generator().manual_seed(0)
    channels = torch.stack([torch.randperm(32, generator=generator)[:16] for _ in range(4)])
    channels = channels.view(2, 2, 16).sort().values
    whole = filled(SMALL, k, v)
    narrow = streamed(
        SMALL, q, k, v, [("turn", 90), ("steps", 40), ("turn", 20)], channels=channels
    )
    index = channels[:, :, None].expand(-1, -1, 128, -1)
    for row in range(2):
        full, cut = whole.row(row).keys[0], narrow.row(row).keys[0]
        assert torch.equal(cut[:, :128].gather(2, index[row]), full[:, :128].gather(2, index[row]))
        assert cut[:, :128].count_nonzero() <= 2 * 128 * 16  # nothing else is left of them
        assert torch.equal(cut[:, 128:], full[:, 128:])  # the newest keep every channel
        output, _ = narrow.attend_past(q[row : row + 1, :, :2], [row], params(k))
        wanted, _ = oracle.attend(q[row, :, :2], cut, whole.row(row).values[0], params(k).scaling)
        assert (output[0] - wanted).abs().max() < 1e-5
    assert narrow.cache.key_codes.shape[-1] == 16


def test_no_more_than_a_tile_is_dequantised_at_a_time(monkeypatch):
    q, k, v = states(12, tokens=700)
    storage, seen = filled(Geometry(2, 32, 64), k, v), []
    monkeypatch.setattr(attention, "TILE", 128)
    for name in ("packed_keys", "packed_values"):
        real = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, real=real: seen.append(a[-1] - a[-2]) or real(*a)
        )
    output, _ = storage.attend_past(q[:, :, :1], [0], params(k))
    assert max(seen) == 128 and len(seen) == 10
    wanted = oracle.attend(q[0, :, :1], *oracle.stored(k[0], v[0], 2, 32, 64), params(k).scaling)
    assert (output[0] - wanted[0]).abs().max() < 1e-5


def shape(tokens, dtype, **changes):
    facts = {
        "batch": 1, "kv_heads": 8, "key_dim": 128, "value_dim": 128,
        "dtype": dtype, "device": torch.device("cpu"),
    }  # fmt: skip
    return StoreShape(**{**facts, **changes})


@pytest.mark.parametrize(
    ("bits", "group", "ratio"), [(2, 32, 5.3), (2, 64, 6.4), (2, 128, 7.1), (4, 32, 3.2)]
)
def test_predicted_bytes_are_the_published_ratios(bits, group, ratio):
    options = KiviOptions(bits=bits, group_size=group)
    facts = shape(131072, torch.float16)
    held = KiviPolicy(options).predicted_nbytes(facts, 131072)
    assert round(facts.dense_entry * 131072 / held, 1) == ratio
    keys, values = 131072, 131072 - 128
    bits_held = (keys + values) * (bits + 32 / group) + 128 * 16
    assert abs(held / (8 * 128 * bits_held / 8) - 1) < 0.02  # the card's formula


@pytest.mark.parametrize(
    ("bits", "channels", "share"), [(2, None, 1 / 5.3), (4, None, 1 / 3.2), (2, 64, 0.15)]
)
def test_a_cache_of_128k_tokens_takes_the_published_share_of_memory(bits, channels, share):
    policy, kept = KiviPolicy(KiviOptions(bits=bits)), channels or 128
    like = torch.empty(0, dtype=torch.float16, device="meta")
    cache = Packed.empty(policy.geometry, (1, 8), 131072, (128, kept, 128), like)
    held = sum(tensor.nbytes for tensor in cache.tensors().values())
    facts = shape(131072, torch.float16, channels=channels)
    assert held == policy.predicted_nbytes(facts, 131072)
    assert held / (2 * 8 * 131072 * 128 * 2) <= share * 1.005  # the ratios have two digits


@pytest.mark.parametrize("channels", [None, 16])
@pytest.mark.parametrize(("tokens", "capacity"), [(20, 40), (300, 300), (300, 333)])
def test_allocated_bytes_are_the_predicted_ones(tokens, capacity, channels):
    _, k, v = states(13, rows=2, tokens=tokens)
    chosen = None if channels is None else torch.arange(16).expand(2, 2, 16)
    policy = KiviPolicy(KiviOptions(bits=2, residual_length=64))
    storage = policy.make_storage()
    storage.fill([piece(k, v, [0, 1], 0, tokens, chosen)], capacity, ordered=True)
    facts = shape(
        0, torch.float32, batch=2, kv_heads=2, key_dim=32, value_dim=32, channels=channels
    )
    assert storage.nbytes == policy.predicted_nbytes(facts, capacity)
    more = capacity + 57
    storage.append_step(k[:, :, :1], v[:, :, :1], [tokens, tokens], more)
    assert storage.nbytes == policy.predicted_nbytes(facts, more)
    for name, tensor in storage.tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
