"""What a capture says where it fails; the capture itself needs a GPU."""

import warnings

import pytest

from kvdock import graph


def test_a_failed_capture_says_nothing_but_its_error():
    def run(error):
        with graph._warnings_of_success():
            warnings.warn("The CUDA Graph is empty.", UserWarning, stacklevel=1)
            if error is not None:
                raise error

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="memory"):
            run(RuntimeError("out of memory"))
    assert caught == []
    with pytest.warns(UserWarning, match="empty"):
        run(None)
