"""What every test session of this repository shares."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what the imports made out of the garbage collector's sight.

    The checks for residue collect garbage; walking through all of torch each time took a second.
    """
    gc.collect()
    gc.freeze()
