"""Every dense kernel against an oracle in float64, at odd sizes, head counts and dtypes."""

import pytest
import torch

from kvdock.kernels.decode import attend_slots
from kvdock.kernels.reference import ReferenceBackend
from kvdock.kernels.sdpa import SDPABackend
from kvdock.kernels.window_scores import window_probabilities, window_votes
from kvdock.kernels.windowed import attend_window
from kvdock.policy import AttentionParams

pytestmark = pytest.mark.versionless

LENGTHS = (1, 2, 127, 128, 129, 513, 1025)
BACKENDS = {"reference": ReferenceBackend(), "sdpa": SDPABackend()}


def states(heads, kv_heads, new, length, dim, *, rows=2, seed=0):
    """Return random queries [rows, H, new, D] and keys and values [rows, K, length, D]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    key, value = draw(rows, kv_heads, length, dim), draw(rows, kv_heads, length, dim)
    return draw(rows, heads, new, dim), key, value


def oracle_weights(query, key, params, visible):
    """Return softmax probabilities in float64, [b, H, Q, N]."""
    query, key = query.double(), key.double()
    group = query.shape[1] // key.shape[1]
    logits = torch.einsum("bhqd,bhnd->bhqn", query, key.repeat_interleave(group, 1))
    logits = logits * params.scaling
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    weights = logits.masked_fill(~visible, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if params.sinks is not None:
        total = total + params.sinks.double().exp().view(1, -1, 1, 1)
    return weights / total


def oracle(query, key, value, params, visible):
    group = query.shape[1] // key.shape[1]
    weights = oracle_weights(query, key, params, visible)
    return (weights @ value.double().repeat_interleave(group, 1)).transpose(1, 2)


def causal(new, length, window=None):
    rows = torch.arange(length - new, length)[:, None]
    columns = torch.arange(length)[None]
    return (columns <= rows) & (columns > rows - (window or length))


def params_of(kind, heads, dim):
    sinks = torch.linspace(-1.0, 2.0, heads) if "sinks" in kind else None
    return AttentionParams(dim**-0.5, 3.0 if "softcap" in kind else None, sinks)


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill(name, length):
    query, key, value = states(4, 2, length, length, 16)
    params = params_of("plain", 4, 16)
    output = BACKENDS[name].attend(query, key, value, params)
    assert output.is_contiguous()
    close(output, oracle(query, key, value, params, causal(length, length)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("new", [1, 2, 128, 600])
def test_the_last_query_meets_the_last_key(name, new):
    query, key, value = states(4, 2, new, 1025, 16)
    params = params_of("plain", 4, 16)
    output = BACKENDS[name].attend(query, key, value, params)
    close(output, oracle(query, key, value, params, causal(new, 1025)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dim", [16, 64, 96])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_and_head_dimensions(name, group, dim):
    query, key, value = states(2 * group, 2, 40, 129, dim)
    params = params_of("plain", 2 * group, dim)
    output = BACKENDS[name].attend(query, key, value, params)
    close(output, oracle(query, key, value, params, causal(40, 129)))


@pytest.mark.parametrize("kind", ["softcap", "sinks", "softcap and sinks"])
@pytest.mark.parametrize(("new", "length"), [(1, 1), (129, 129), (40, 129), (1100, 1100)])
def test_softcap_and_sinks_of_the_reference(kind, new, length):
    query, key, value = states(6, 2, new, length, 16)
    params = params_of(kind, 6, 16)
    assert not params.plain
    output = BACKENDS["reference"].attend(query, key, value, params)
    close(output, oracle(query, key, value, params, causal(new, length)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_half_precision(name, dtype, tolerance):
    query, key, value = (x.to(getattr(torch, dtype)) for x in states(4, 2, 129, 129, 64))
    params = params_of("plain", 4, 64)
    output = BACKENDS[name].attend(query, key, value, params)
    assert output.dtype == query.dtype
    close(output, oracle(query, key, value, params, causal(129, 129)), tolerance)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize(
    ("new", "held", "seen", "window"),
    [(1, 1, 0, 4), (129, 129, 0, 16), (600, 600, 0, 513), (1, 16, 100, 16), (40, 55, 60, 16)],
)
def test_sliding_window(kind, new, held, seen, window):
    """``held`` of the columns are still there: the last ones."""
    query, key, value = states(4, 2, new, seen + new, 16)
    params = params_of(kind, 4, 16)
    visible = causal(new, seen + new, window)
    mask = torch.ones(2, seen + new, dtype=torch.bool)
    mask[1, : min(seen + new - 1, 9)] = False
    last = slice(seen + new - held, None)
    for given in (None, mask):
        output = attend_window(
            query, key[:, :, last], value[:, :, last], params, window=window, seen=seen, mask=given
        )
        seen_by = visible if given is None else visible & given[:, None, None, :]
        expected = oracle(query, key, value, params, seen_by)
        for row in range(2):
            real = slice(None) if given is None else given[row, seen:]
            close(output[row, real], expected[row, real])
        assert output.isfinite().all(), "a pad's output must not be NaN"


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 129])
@pytest.mark.parametrize("gaps", [False, True])
def test_decode(kind, group, length, gaps):
    query, key, value = states(2 * group, 2, 1, length, 16)
    params = params_of(kind, 2 * group, 16)
    valid = None
    if gaps:
        valid = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(1)) > 0.3
        valid[..., -1] = True
    output = attend_slots(query, key, value, valid, params)
    visible = torch.ones(2, 2, length, dtype=torch.bool) if valid is None else valid
    visible = visible.repeat_interleave(group, 1)[:, :, None]
    close(output, oracle(query, key, value, params, visible))


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "softcap and sinks"])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("window", "length"), [(1, 1), (1, 129), (8, 8), (8, 129)])
def test_probabilities_of_the_window(kind, group, window, length, monkeypatch):
    monkeypatch.setattr("kvdock.kernels.window_scores.BLOCK_BYTES", 1)  # one head at a time
    query, key, _ = states(2 * group, 2, window, length, 16)
    params = params_of(kind, 2 * group, 16)
    blocks = list(window_probabilities(query, key, params))
    assert [heads for heads, _ in blocks] == [slice(0, 1), slice(1, 2)]
    found = torch.cat([block for _, block in blocks], dim=1)
    expected = oracle_weights(query, key, params, causal(window, length))
    close(found, expected.view(2, 2, group, window, length))
    votes = window_votes(query, key, params)
    close(votes, expected.view(2, 2, group, window, length).sum(3).mean(2))
