"""Which cases of the contract an environment other than the general one need not repeat."""

import tomllib
from pathlib import Path

import pytest

from kvdock.testing import FAMILIES

HERE = Path(__file__).parent
PLUGINS = HERE.parents[1] / "plugins"


def home(method):
    """Return the environment that a method is tested in; None for a method of other packages."""
    path = PLUGINS / method / "pyproject.toml"
    if not path.exists():
        return None
    return tomllib.loads(path.read_text())["tool"]["kvdock"]["environment"]


def is_general(method, family):
    """Tell cases without a sparse prefill; one family of each single method is repeated."""
    homes = {home(id) for id in method.split("+")}
    return homes == {"general"} and family != FAMILIES[0]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            given = item.callspec.params
            method = given["method"] if "method" in given else given["methods"]
            if is_general(method, given.get("family")):
                item.add_marker(pytest.mark.general)
