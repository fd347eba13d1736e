"""A model's own Python code runs where it is asked for by flag, and nowhere else."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from kvdock.errors import UnsupportedError
from kvdock.footprint import read_model
from kvdock_bench import models
from kvdock_bench.commands import kvdock_commands
from kvdock_bench.errors import BenchError
from kvdock_bench.fingerprint import file_hashes
from kvdock_bench.folder import read_run
from kvdock_bench.session import bench

CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(tmp_path):
    """A file that is there once the model's code has run."""
    return tmp_path / "code ran"


@pytest.fixture
def own_code(model_folder, tmp_path, mark, monkeypatch):
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(model_folder, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
    places = {"OwnConfig": "configuration_own", "OwnModel": "modeling_own"}
    config["model_type"] = "own-llama"
    config["auto_map"] = {auto: f"{places[name]}.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIG.format(mark=str(mark)))
    (folder / "modeling_own.py").write_text(MODEL)
    yield str(folder)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "use",
    [
        lambda path: models.load(path, dtype="float32", device="cpu"),
        lambda path: models.describe(path, dtype="float32", device="cpu"),
        models.peek_shape,
        models.peek_context,
    ],
    ids=["load", "describe", "peek_shape", "peek_context"],
)
def test_code_is_not_run_unasked(own_code, mark, use):
    with pytest.raises(BenchError, match=r"Python code of its own.*add --trust_remote_code"):
        use(own_code)
    assert not mark.exists()


def test_the_estimate_runs_no_code_and_asks_nobody(own_code, mark, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UnsupportedError, match="bring code of their own are not run"):
        read_model(own_code)
    assert not mark.exists()


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
def test_a_run_needs_the_flag_and_warns(own_code, mark, arguments, capsys, dry):
    given = replace(arguments, model_path=own_code, dry_run=dry)
    with pytest.raises(BenchError, match="--trust_remote_code"):
        bench(given)
    assert not mark.exists()
    assert "Warning" not in capsys.readouterr().err
    given = replace(given, trust_remote_code=True, overwrite=True, limit=1)
    assert bench(given) == 0
    assert mark.exists()
    warning = capsys.readouterr().err
    assert warning.count("Warning: --trust_remote_code: Python code that comes with") == 1
    assert own_code in warning
    if not dry:
        files = read_run(arguments.output_dir / "run")["model"]["files"]
        assert {"configuration_own.py", "modeling_own.py"} <= set(files)


def test_the_fingerprint_follows_the_code(own_code, tmp_path):
    folder = tmp_path / "own"
    before = file_hashes(folder)
    (folder / "modeling_own.py").write_text(MODEL + "# another\n")
    assert file_hashes(folder) != before


def test_the_flag_reaches_the_run_from_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("kvdock_bench.session.bench", lambda given: seen.append(given) or 0)
    app = typer.Typer(pretty_exceptions_enable=False)
    kvdock_commands(app)
    for words in ([], ["--trust_remote_code"]):
        assert CliRunner().invoke(app, ["bench", *words]).exit_code == 0
    assert [given.trust_remote_code for given in seen] == [False, True]
