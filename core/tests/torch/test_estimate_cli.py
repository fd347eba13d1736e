"""`kvdock doctor --model` prints what the estimate says, and refuses what fits nowhere."""

import re

import pytest
from typer.testing import CliRunner

from kvdock import available
from kvdock.cli_app import app
from kvdock.compose import compose
from kvdock.errors import KVDockError
from kvdock.estimate import Estimate
from kvdock.footprint import read_model
from kvdock.registry import default_host
from kvdock.testing_models import tiny_model

pytestmark = pytest.mark.skipif("snapkv" not in available(), reason="needs kvdock-snapkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for section in ("_versions", "_devices", "_backends", "_sparse_backends"):
        monkeypatch.setattr(f"kvdock.cli_doctor.{section}", list)


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_one_method_at_several_lengths(folder):
    settings = ("--lengths", "100", "3000", "--budget", "64", "--memory", "1MiB", "--no-contract")
    result = invoke("snapkv", "--model", folder, *settings)
    assert result.exit_code == 0, result.output
    composition = compose(default_host(), "snapkv", 64, {})
    estimate = Estimate(read_model(folder), composition)
    assert estimate.cache(3000) == 2 * 64 * 16 * 2 * 3 * 4
    (row,) = re.findall(r"^  snapkv +(.*)", result.output, re.MULTILINE)
    assert row.split("  ")[0] == "48 KiB (64.0%)"
    assert f"about {estimate.longest(2**20)}" in row
    assert "full cache" in result.output
    assert "Contract" not in result.output


def test_all_methods_and_why_one_does_not_fit(folder):
    result = invoke("--model", folder, "--lengths", "200", "5000", "--memory", "4GiB")
    named = re.findall(r"^  (\w+) +(?:\d|\w)", result.output, re.MULTILINE)
    assert set(available()) <= set(named)
    assert "the model is made for 4096 tokens" in result.output
    if "kivi" in available():
        # heads of 16 are smaller than a group
        assert "head_dim is 16" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--memory", "100KiB"], r"the weights take .* but there are 100 KiB .*--memory"),
        (["--memory", "1MiB", "--budget", "1MiB"], r"the cache may take at most .*Lower --budget"),
        (["--budget", "32"], "snapkv: budget 32tok leaves nothing beside window"),
        (["--dtype", "int4"], "dtype is 'int4', expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(folder, arguments, found):
    result = invoke("snapkv", "--model", folder, "--lengths", "100", *arguments)
    assert isinstance(result.exception, KVDockError)
    assert re.search(found, str(result.exception))
