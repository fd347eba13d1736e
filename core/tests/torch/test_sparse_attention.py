"""The reference of block-sparse attention against float64, and the choice of a backend."""

import re

import pytest
import torch

from kvdock.errors import UnsupportedError
from kvdock.kernels import sparse
from kvdock.kernels.blocks import BlockGrid, all_blocks
from kvdock.kernels.sparse_check import trust
from kvdock.kernels.sparse_reference import ReferenceSparse
from kvdock.policy import AttentionParams

from .sparse_oracle import block_mask, oracle, random_lists, states

pytestmark = pytest.mark.versionless

CPU = torch.device("cpu")
REFERENCE = ReferenceSparse()


def compare(grid, dim, tolerance=1e-5, dtype=torch.float32, **kwargs):
    query, key, value = states(grid, dim, dtype=dtype, **kwargs)
    shape = {"rows": query.shape[0], "heads": query.shape[1]}
    scaling = dim**-0.5
    lists = random_lists(grid, **shape)
    output = REFERENCE.attend(query, key, value, lists, AttentionParams(scaling))
    assert output.is_contiguous()
    assert output.dtype == dtype
    expected = oracle(query, key, value, block_mask(grid, **shape), grid, scaling)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_whole_prompts(length):
    compare(BlockGrid(length, length), 16)


@pytest.mark.parametrize("length", [4096, 4097])
def test_long_prompts(length):
    compare(BlockGrid(length, length), 8, rows=1, heads=2, kv_heads=1)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1000), (128, 1000), (129, 257), (300, 1024)])
def test_queries_at_the_end_of_longer_keys(queries, keys):
    compare(BlockGrid(queries, keys), 16)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 4])
def test_head_dimensions_and_groups(dim, group):
    compare(BlockGrid(150, 260), dim, rows=1, heads=2 * group, kv_heads=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    compare(BlockGrid(129, 300), 64, tolerance, dtype)


def test_a_row_without_blocks_is_zero():
    grid = BlockGrid(40, 100, 16)
    query, key, value = states(grid, 16)
    lists = random_lists(grid)
    lists.count[1, 2, 1] = 0
    output = REFERENCE.attend(query, key, value, lists, AttentionParams(0.25))
    rows = torch.arange(grid.offset, grid.keys) // grid.block - grid.first == 1
    assert (output[1, rows, 2] == 0).all()
    assert (output[1, ~rows, 2] != 0).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (AttentionParams(0.1, softcap=30.0), "caps its scores"),
        (AttentionParams(0.1, sinks=torch.zeros(4)), "learned sinks"),
    ],
)
def test_scores_of_another_kind_are_refused(params, message):
    grid = BlockGrid(20, 20)
    lists = all_blocks(grid, 2, 4, CPU)
    with pytest.raises(UnsupportedError, match=message):
        REFERENCE.attend(*states(grid, 16), lists, params)


def test_the_fastest_usable_backend_is_taken(monkeypatch):
    assert sparse.choose_sparse_backend(None, CPU, torch.float32, 64).name == "reference"

    def broken(*args):
        raise OSError("undefined symbol")

    ready = ReferenceSparse()
    backends = {"flash-attn-4": broken, "triton": lambda *args: ready}
    monkeypatch.setattr(sparse, "SPARSE_BACKENDS", {**sparse.SPARSE_BACKENDS, **backends})
    for name in (None, "auto"):
        assert sparse.choose_sparse_backend(name, CPU, torch.float32, 64) is ready
    with pytest.raises(UnsupportedError, match="'flash-attn-4' is not usable here: undefined"):
        sparse.choose_sparse_backend("flash-attn-4", CPU, torch.float32, 64)


@pytest.mark.parametrize("name", ["flash-attn-4", "triton", "flex", "flashinfer"])
def test_a_backend_that_cannot_serve_is_an_error(name):
    with pytest.raises(UnsupportedError, match=rf"{name!r} is not usable here.*kvdock doctor"):
        sparse.choose_sparse_backend(name, CPU, torch.bfloat16, 128)


def test_an_unknown_backend_names_the_known():
    with pytest.raises(UnsupportedError, match="unknown sparse attention backend 'fast'.*triton"):
        sparse.choose_sparse_backend("fast", CPU, torch.float32, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "block", "message"),
    [
        ((8, 0), torch.bfloat16, 128, 128, "9.x, found 8.0: older chips ignore the lists"),
        ((10, 0), torch.bfloat16, 128, 128, "9.x, found 10.0"),
        ((9, 0), torch.float32, 128, 128, "float16 or bfloat16"),
        ((9, 0), torch.bfloat16, 80, 128, "head_dim 64, 96, 128 in blocks of 128, found 80"),
        ((9, 0), torch.bfloat16, 128, 64, "found 128 and 64"),
    ],
)
def test_flash_attention_is_gated(monkeypatch, capability, dtype, head_dim, block, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UnsupportedError, match=message):
        sparse.choose_sparse_backend("flash-attn-4", torch.device("cuda"), dtype, head_dim, block)


class Dense:
    """What a library does that ignores the lists."""

    name = "dense"

    def attend(self, query, key, value, lists, params):
        grid = BlockGrid(query.shape[2], key.shape[2], lists.block)
        full = all_blocks(grid, query.shape[0], query.shape[1], query.device)
        return REFERENCE.attend(query, key, value, full, params)


def test_a_backend_that_ignores_the_lists_is_not_trusted():
    trust(REFERENCE, CPU, 64, 16)
    with pytest.raises(UnsupportedError, match="does not attend to the listed blocks only"):
        trust(Dense(), CPU, 64, 16)


def test_doctor_hears_why_a_backend_is_not_usable():
    found = {name: (usable, reason) for name, usable, reason in sparse.probe_sparse_backends()}
    assert list(found) == list(sparse.SPARSE_BACKENDS)
    assert found["reference"] == (True, "")
    if not torch.cuda.is_available():
        others = [found[name] for name in found if name != "reference"]
        # what is not installed is missed before the GPU is
        assert all(not usable and re.search("GPU|No module", why) for usable, why in others)


@pytest.mark.parametrize(
    ("asked", "dense"),
    [
        (None, None),
        ("auto", "auto"),
        ("triton", None),
        ("reference", "reference"),
        ("sdpa", "sdpa"),
    ],
)
def test_the_dense_backend_beside(asked, dense):
    assert sparse.dense_beside(asked) == dense


def test_the_dense_backend_beside_nothing_known():
    with pytest.raises(UnsupportedError, match="unknown attention backend 'fast'"):
        sparse.dense_beside("fast")
