"""Loading, attaching and detaching a method changes nothing in torch, transformers or Python."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kvdock import available

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("residue.py")


@pytest.fixture(scope="module")
def found():
    """Run in a process that has not imported a plugin yet, since an import may change things."""
    command = [sys.executable, str(PROGRAM), *available()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", available())
def test_nothing_is_left_behind(found, method):
    assert found[method] == []


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("residue", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def other(*args, **kwargs):
    return args


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.nn.functional, "softmax"),
        (torch.nn.Module, "__call__"),
        (transformers.GenerationMixin, "generate"),
        (transformers.modeling_utils, "a_new_name"),
    ],
)
def test_a_patch_is_found(program, monkeypatch, owner, name):
    patched = program.left_behind(lambda: monkeypatch.setattr(owner, name, other, raising=False))
    assert any(item.endswith(f".{name}") for item in patched), patched


@pytest.mark.parametrize(
    ("action", "name"),
    [
        (lambda patch: patch.setenv("KVDOCK_TEST", "1"), "environment"),
        (lambda patch: patch.setattr("sys.path", [*sys.path, "x"]), "path"),
        (lambda patch: torch.use_deterministic_algorithms(True), "deterministic"),
    ],
)
def test_a_switch_is_found(program, monkeypatch, action, name):
    try:
        assert name in program.left_behind(lambda: action(monkeypatch))
    finally:
        torch.use_deterministic_algorithms(False)
