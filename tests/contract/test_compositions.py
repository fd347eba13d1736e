"""Methods of different roles keep the contract together, wherever they are installed together."""

import pytest

from kvdock import available
from kvdock.testing import CHECKS, Case

COMPOSITIONS = (
    "snapkv+kivi",
    "snapkv+think",
    "think+kivi",
    "snapkv+think+kivi",
    "flexprefill+snapkv",
    "flexprefill+kivi",
    "xattention+snapkv",
    "xattention+kivi",
)
INSTALLED = [names for names in COMPOSITIONS if set(names.split("+")) <= set(available())]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("methods", INSTALLED)
def test_contract(methods, check):
    check(Case(methods))
