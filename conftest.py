"""What every test session of this repository shares."""

from __future__ import annotations

import gc

import pytest

import kvdock


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what the imports made out of the garbage collector's sight.

    The checks for residue collect garbage; walking through all of torch each time took a second.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what `beside` says needs other methods, where they are not installed."""
    needed = {name for mark in item.iter_markers("beside") for name in mark.args}
    # every test comes here, so that those who need nothing must not look for it
    if missing := needed and sorted(needed - set(kvdock.available())):
        pytest.skip(f"not installed: {', '.join(missing)}")
