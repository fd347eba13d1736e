import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from kvdock_bench.commands import kvdock_commands, repeat_flags
from kvdock_bench.errors import BenchError


@pytest.fixture
def app():
    app = typer.Typer(pretty_exceptions_enable=False)
    kvdock_commands(app)
    return app


def run(app, *words):
    return CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "200", "TERM": "dumb"})


def test_importing_the_commands_is_light():
    code = (
        "import sys, kvdock_bench.commands as c; heavy = {'torch', 'transformers', 'matplotlib',"
        "'pydantic', 'numpy'} & set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_flag_takes_several_values():
    words = ["--acceleration", "SnapKV", "H2O", "--resume", "--device", "0", "1", "--limit", "3"]
    assert repeat_flags(words) == [
        *("--acceleration", "SnapKV", "--acceleration", "H2O", "--resume"),
        *("--device", "0", "--device", "1", "--limit", "3"),
    ]
    assert repeat_flags(["--set", "a.b=-1", "c.d=2"]) == ["--set", "a.b=-1", "--set", "c.d=2"]
    assert repeat_flags(["--set=a.b=1", "x"]) == ["--set=a.b=1", "x"]
    assert repeat_flags([]) == []


@pytest.mark.parametrize(
    "words", [["--acceleration", "fake", "FAKE"], ["--acceleration", "fake"] * 2]
)
def test_both_ways_of_naming_methods(app, words, model_folder, config_file):
    common = ("--model_path", str(model_folder), "--cfg_path", str(config_file), "--dry_run")
    result = run(app, *words, *common, "--budget", "64", "32", "--set", "fake.window=4")
    assert result.exit_code == 0, result.output
    assert "Fake 64" in result.output
    assert "Fake 32" in result.output
    assert "window=4" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gp_num", "0/2"], "--gp_num 0/2: expected GPUs per model"),
        (["--adapter_path", "x"], "--adapter_path x: no folder with adapter_config.json"),
        (["--server", "rwkv"], "--server rwkv is unknown. Allowed: transformers, vllm."),
    ],
)
def test_impossible_flags_say_so(app, words, message):
    error = run(app, *words).exception
    assert isinstance(error, BenchError)
    assert message in str(error)


@pytest.mark.parametrize(
    "words", [["--limit", "0"], ["--limit", "x"], ["--nosuch"], ["stray"], ["--budget"]]
)
def test_bad_flags_are_usage_errors(app, words):
    assert run(app, *words).exit_code == 2


def test_the_help_names_every_flag(app):
    text = run(app, "--help").output
    names = """
        model_path cfg_path acceleration budget set device torch_dtype batch_size limit max_length
        template save_tag output_dir resume overwrite dry_run server vllm_python max_model_len
        gpu_memory_utilization gp_num parallel workers ray-address launcher adapter_path
        time_limit
    """
    for flag in names.split():
        assert f"--{flag}" in text
