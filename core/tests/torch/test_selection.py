"""`top_positions` against a sort on (score descending, position ascending)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdock.kernels.selection import top_positions

pytestmark = pytest.mark.versionless

SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38]),
    st.floats(width=32, allow_nan=False),
)


def by_sorting(row, count):
    order = sorted(range(len(row)), key=lambda at: (-row[at], at))
    return sorted(order[:count])


@given(st.lists(SCORES, min_size=1, max_size=40), st.data())
def test_ties_go_to_the_lower_position(row, data):
    count = data.draw(st.integers(0, len(row)))
    scores = torch.tensor(row, dtype=torch.float32)
    found = top_positions(scores, count)
    assert found.tolist() == by_sorting(scores.tolist(), count)


def test_many_rows_heads_and_plateaus():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 3, (2, 4, 5000), generator=generator).float() / 7
    found = top_positions(scores, 1234)
    assert found.dtype == torch.int64 and found.shape == (2, 4, 1234)
    for row, chosen in zip(scores.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert chosen.tolist() == by_sorting(row.tolist(), 1234)
    assert torch.equal(top_positions(scores.transpose(0, 1), 1234), found.transpose(0, 1))


@pytest.mark.parametrize("count", [5, 6])
def test_everything_is_taken_when_there_is_no_more(count):
    assert top_positions(torch.randn(2, 3, 5), count).tolist() == [[[0, 1, 2, 3, 4]] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_compared_by_value(dtype):
    scores = torch.tensor([0.5, -2.0, 1.5, 1.5, 0.0], dtype=dtype)
    assert top_positions(scores, 2).tolist() == [2, 3]


def test_the_same_call_gives_the_same_answer():
    scores = torch.zeros(3, 2, 999)
    first = top_positions(scores, 100)
    assert all(torch.equal(top_positions(scores, 100), first) for _ in range(3))
    assert first[0, 0].tolist() == list(range(100))
