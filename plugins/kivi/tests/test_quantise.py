"""Codes, scales and their places against hand-made numbers and the layout of the authors' code."""

import pytest
import torch

from kvdock_kivi import quantise, writing
from kvdock_kivi.geometry import Geometry
from kvdock_kivi.packed import Packed

from . import oracle

LAYOUTS = [
    Geometry(bits, group, residual)
    for bits in (2, 4)
    for group, residual in ((32, 32), (32, 96), (32, 128), (64, 64), (64, 192), (128, 128))
]


@pytest.mark.parametrize(
    ("bits", "words", "scale"),
    [
        (2, [0x55555000, 0xFFFAAAAA], 10.3333),
        (4, [0x33221100, 0x77665544, 0xBBAA9988, 0xFFEEDDCC], 2.06667),
    ],
)
def test_golden_vectors_of_the_authors_code(bits, words, scale):
    codes, s, z = quantise.quantise_groups(torch.arange(32.0), 2**bits - 1)
    assert oracle.official_words(codes, bits) == words
    assert (s.item(), z.item()) == (torch.tensor(scale).half().item(), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_number_comes_back_within_half_a_step(bits, dtype):
    x = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    codes, scale, zero = quantise.quantise_groups(x, 2**bits - 1)
    off = (scale.float()[:, None] * codes + zero.float()[:, None] - x.float()).abs()
    # float16 holds the other types' minima exactly, of float32 it rounds them
    zero_off = zero.float().abs() * 2**-11 if dtype == torch.float32 else 0.0
    assert (off.amax(-1) <= scale.float() / 2 * (1 + 2**-10) + zero_off).all()
    assert off.max() > scale.float().max() * 0.4  # the bound means something
    one, s, z = oracle.quantised(x[5], 2**bits - 1)
    assert torch.equal(codes[5].double(), one) and (scale[5], zero[5]) == (s, z)


def test_a_constant_group_is_exact_and_has_codes_0():
    x = torch.tensor([[2.5] * 32, [-0.0] * 32])
    codes, scale, zero = quantise.quantise_groups(x, 3)
    assert codes.eq(0).all() and scale.eq(0).all() and zero.tolist() == [2.5, 0.0]
    assert not torch.signbit(zero[1])


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan"), 70000.0])
def test_what_float16_cannot_hold_reads_as_nan_in_its_own_group(wrong):
    x = torch.randn(2, 32)
    x[0, 7] = wrong
    codes, scale, zero = quantise.quantise_groups(x, 15)
    back = scale.float()[:, None] * codes + zero.float()[:, None]
    assert back[0].isnan().all() and back[1].isfinite().all()


@pytest.mark.parametrize("geometry", LAYOUTS, ids=str)
def test_every_code_comes_back_from_its_place(geometry):
    n, block, planes = geometry.plane, geometry.block, geometry.planes
    assert block % geometry.group == 0 and geometry.residual % block == 0
    tokens = 2 * geometry.residual
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, geometry.levels + 1, (2, tokens, 5), generator=generator)
    words = quantise.pack(codes, geometry)
    assert words.shape == (2, tokens // block, n, 5) and words.dtype == torch.int16
    assert torch.equal(quantise.unpack(words, geometry), codes.short())
    for b, j, i, d in ((0, 0, 0, 0), (1, planes - 1, n - 1, 4), (0, 1, n - 1, 2)):
        word = words[1, b, i, d].item() & 0xFFFF
        code = codes[1, b * block + j * n + i, d].item()
        assert word >> (geometry.bits * j) & geometry.levels == code


@pytest.mark.parametrize("bits", [2, 4])
def test_planes_hold_the_bits_of_the_official_layout(bits):
    geometry = Geometry(bits, 32, 64)
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn(1, 1, 64, 32, generator=generator) for _ in range(2))
    cache = Packed.empty(geometry, (1, 1), 128, (32, 32, 32), key)
    writing.write_keys(cache, geometry, slice(0, 1), key, 0, None)
    writing.write_values(cache, geometry, slice(0, 1), value, 0)
    for words, wanted, per_channel in (
        (cache.key_codes, key, True), (cache.value_codes, value, False)
    ):  # fmt: skip
        codes = quantise.unpack(words[0, 0], geometry)[:64]
        groups = wanted[0, 0].mT if per_channel else wanted[0, 0]  # keys [D, T], values [T, D]
        official = []
        for line in groups:
            parts = [oracle.quantised(part, geometry.levels)[0] for part in line.split(32)]
            official += oracle.official_words(torch.cat(parts).long(), bits)
        assert oracle.official_words(codes.mT if per_channel else codes, bits) == official


def test_keys_lose_less_per_channel_when_some_channels_stand_out():
    generator = torch.Generator().manual_seed(3)
    keys, query = (torch.randn(128, 64, generator=generator) for _ in range(2))
    keys[:, [3, 40]] += 12
    geometry = Geometry(2, 32, 128)
    per_channel = quantise.dequantise_keys(*quantise.quantise_keys(keys, geometry), 32)
    per_token = quantise.dequantise_values(*quantise.quantise_values(keys, geometry), 32)
    exact = query @ keys.T
    errors = [(query @ x.T - exact).norm() / exact.norm() for x in (per_channel, per_token)]
    assert errors[0] < 0.6 * errors[1]
