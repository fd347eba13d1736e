import inspect
from pathlib import Path

import pluggy

from kvdock import hookspecs

HOOKS = {
    "kvdock_methods": [],
    "kvdock_configure": ["settings"],
    "kvdock_select_kernel": ["op", "device", "dtype"],
    "kvdock_build_policy": ["method", "options"],
    "kvdock_commands": ["app"],
}


def specs():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return {name: getattr(manager.hook, name).spec for name in HOOKS}


def test_the_hooks_and_their_arguments_are_the_fixed_ones():
    found = {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if name.startswith("kvdock_")
    }
    assert found == HOOKS


def test_how_each_hook_is_called():
    spec = specs()
    assert [name for name in HOOKS if spec[name].opts["historic"]] == ["kvdock_configure"]
    assert [name for name in HOOKS if spec[name].opts["firstresult"]] == [
        "kvdock_select_kernel",
        "kvdock_build_policy",
    ]


def test_no_hook_has_defaults_because_pluggy_versions_disagree_on_them():
    for name in HOOKS:
        parameters = inspect.signature(getattr(hookspecs, name)).parameters.values()
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


def test_the_specification_fits_one_screen_and_every_hook_is_described():
    assert len(Path(hookspecs.__file__).read_text().splitlines()) < 80
    for name in HOOKS:
        assert inspect.getdoc(getattr(hookspecs, name))
