"""`BatchLayout` and `RowSpan` against a plain reading of the mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdock.errors import UnsupportedError
from kvdock.layout import BatchLayout

pytestmark = pytest.mark.versionless


@st.composite
def masks(draw):
    """Draw (mask [B][seen + Q], seen)."""
    batch, seen, new = draw(st.integers(1, 4)), draw(st.integers(0, 6)), draw(st.integers(1, 9))
    cell = st.booleans() if draw(st.booleans()) else st.just(True)
    row = st.lists(cell, min_size=seen + new, max_size=seen + new)
    return draw(st.lists(row, min_size=batch, max_size=batch)), seen


def layout_of(mask, seen, dtype=torch.bool):
    tensor = torch.tensor(mask).to(dtype)
    return BatchLayout(tensor, len(mask), len(mask[0]) - seen, seen)


@given(masks(), st.sampled_from([torch.bool, torch.int64]))
def test_rows_are_taken_and_put_back(drawn, dtype):
    mask, seen = drawn
    layout = layout_of(mask, seen, dtype)
    new = [row[seen:] for row in mask]
    assert layout.new_tokens == [sum(row) for row in new]
    assert (layout.spans is None) == all(all(row) for row in new)
    assert (layout.host_mask is None) == all(all(row) for row in mask)
    states = torch.randn(len(mask), 2, layout.columns, 3)
    output = torch.full((len(mask), layout.columns, 2, 3), float("nan"))
    for index, span in enumerate(layout.row_spans):
        real = torch.tensor(new[index])
        assert (span.row, span.count) == (index, int(real.sum()))
        taken = span.take(states)
        assert torch.equal(taken, states[index : index + 1, :, real])
        span.put(output, taken.transpose(1, 2))
        assert torch.equal(output[index, real], states[index, :, real].transpose(0, 1))
        assert output[index, ~real].isnan().all(), "a pad's column was written"


@given(masks())
def test_contiguous_rows_are_taken_as_views(drawn):
    mask, seen = drawn
    layout = layout_of(mask, seen)
    states = torch.randn(len(mask), 1, layout.columns, 1)
    for row, span in zip(mask, layout.row_spans, strict=True):
        where = [at for at, real in enumerate(row[seen:]) if real]
        gapless = not where or where[-1] - where[0] + 1 == len(where)
        assert isinstance(span.columns, slice) == gapless
        if gapless and where:
            assert span.take(states).untyped_storage() is not None
            assert span.take(states).data_ptr() == states[span.row, 0, where[0]].data_ptr()


@given(masks())
def test_the_past_must_be_what_it_was(drawn):
    mask, seen = drawn
    past = [sum(row[:seen]) for row in mask]
    layout_of(mask, seen).check_past(past)
    with pytest.raises(UnsupportedError, match="unchanged for the columns"):
        layout_of(mask, seen).check_past([n + 1 for n in past])


def test_without_a_mask_every_column_is_real():
    layout = BatchLayout(None, 2, 5, 3)
    assert layout.spans is None and layout.new_tokens == [5, 5]
    layout.check_past([3, 3])
    with pytest.raises(UnsupportedError, match=r"marks \[3, 3\] .* holds \[3, 2\] tokens"):
        BatchLayout(None, 2, 5, 3).check_past([3, 2])


def test_it_passes_for_a_mask_where_libraries_move_masks():
    layout = BatchLayout(None, 2, 5, 3)
    assert layout.to("cpu") is layout and layout.contiguous() is layout
    assert (layout.ndim, layout.shape) == (2, (2, 8))
