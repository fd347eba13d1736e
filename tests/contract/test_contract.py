"""Every installed method keeps the contract on every model family."""

import pytest

from kvdock import available
from kvdock.testing import CHECKS, FAMILIES, Case


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("method", available())
def test_contract(method, check, family):
    check(Case(method, family))
