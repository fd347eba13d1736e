import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import kvdock

TORCH_FREE = (
    "kvdock",
    "kvdock.errors",
    "kvdock.options",
    "kvdock.method",
    "kvdock.hookspecs",
    "kvdock.registry",
    "kvdock.budget",
    "kvdock.cli",
    "kvdock.cli_app",
    "kvdock.cli_list",
    "kvdock.cli_doctor",
    "kvdock.cli_estimate",
    "kvdock.scaffold",
)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_torch_free_half_imports_no_torch():
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {TORCH_FREE}];"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names_exist():
    assert len(set(kvdock.__all__)) == len(kvdock.__all__)
    assert all(hasattr(kvdock, name) for name in kvdock.__all__)


def test_available_asks_the_default_host():
    assert kvdock.available() == kvdock.default_host().available()


def test_attach_stays_a_function_when_the_submodule_appears():
    """Importing `kvdock.attach` sets the package's attribute of that name; it must not stick."""
    before = kvdock.attach
    kvdock.attach = ModuleType("kvdock.attach")
    assert kvdock.attach is before


def test_attach_can_still_be_replaced_by_a_test(monkeypatch):
    monkeypatch.setattr(kvdock, "attach", len)
    assert kvdock.attach is len


def test_attach_passes_everything_on(monkeypatch):
    module = ModuleType("kvdock.attach")
    module.attach = lambda *args, **kwargs: (args, kwargs)
    monkeypatch.setitem(sys.modules, "kvdock.attach", module)
    args, kwargs = kvdock.attach("model", "snapkv", budget="25%", backend="sdpa", window=3)
    assert args == ("model", "snapkv")
    assert kwargs == {
        "budget": "25%",
        "backend": "sdpa",
        "graph": "auto",
        "slice_above": 16384,
        "window": 3,
    }


def test_the_real_submodule_keeps_attach_a_function_of_the_same_signature():
    pytest.importorskip("torch")
    code = (
        "import kvdock, inspect; assert inspect.isfunction(kvdock.attach);"
        "import kvdock.attach; assert inspect.isfunction(kvdock.attach);"
        "from kvdock.attach import attach;"
        "parameters = inspect.signature(attach).parameters.values();"
        "print([(p.name, p.kind, p.default) for p in parameters])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    ours = inspect.signature(kvdock.attach).parameters.values()
    assert result.stdout.strip() == str([(p.name, p.kind, p.default) for p in ours])
