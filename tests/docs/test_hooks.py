"""docs/hooks.md says what the live hook specifications say."""

import inspect
import re
from pathlib import Path

import pluggy
import pytest

from kvdock import hookspecs

pytestmark = pytest.mark.versionless

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hooks.md").read_text("utf-8")


def specified():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    names = [name for name in vars(hookspecs) if name.startswith("kvdock_")]
    return {name: getattr(manager.hook, name).spec for name in names}


def described():
    _, *parts = re.split(r"^## `(\w+)\((.*?)\)`$", PAGE, flags=re.MULTILINE)
    return {
        name: (arguments, text)
        for name, arguments, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def point(text, name):
    [found] = re.findall(rf"^- \*\*{name}\*\*:? ?(.*)$", text, re.MULTILINE)
    return found


def test_the_hooks_are_described_in_the_order_of_the_specification():
    assert list(described()) == list(specified())
    assert len(re.findall(r"^## ", PAGE, re.MULTILINE)) == len(specified())


@pytest.mark.parametrize("name", specified())
def test_a_hook_is_described_as_it_is(name):
    spec, (arguments, text) = specified()[name], described()[name]
    signature = inspect.signature(spec.function)
    assert arguments == ", ".join(signature.parameters)
    summary = inspect.getdoc(spec.function).split("\n")[0]
    assert text.strip().split("\n")[0] == summary
    said = dict(re.findall(r"`(\w+)` \(`([^`]+)`\)", point(text, "Arguments")))
    assert said == {key: value.annotation for key, value in signature.parameters.items()}
    returned = re.match(r"`([^`]+)`", point(text, "Returns"))[1]
    assert returned == signature.return_annotation
    assert point(text, "Called")
    yes = {True: "yes", False: "no"}
    historic = yes[bool(spec.opts["historic"])]
    ways = f"{yes[bool(spec.opts['firstresult'])]}. **Historic**: {historic}."
    assert point(text, "First result") == ways


def test_groups_and_number_are_the_live_ones():
    for group in (hookspecs.ENTRY_POINT_GROUP, hookspecs.COMMAND_GROUP):
        assert f"`{group}`" in PAGE
    assert f"has number {hookspecs.SPEC_VERSION} " in PAGE
