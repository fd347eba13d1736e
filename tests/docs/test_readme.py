"""What the README says of methods, commands and code is true."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvdock import available

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def load_table():
    spec = importlib.util.spec_from_file_location(
        "methods_table", Path(__file__).with_name("methods_table.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_plugin_has_its_row():
    tool = load_table()
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    named = [re.search(r"plugins/(\w+)/README", line)[1] for line in rows]
    assert named == tool.plugin_ids(), "run: nox -s docs"


@pytest.mark.parametrize("method", [id for id in available() if (ROOT / "plugins" / id).exists()])
def test_rows_equal_the_records(method):
    assert load_table().row(method) in README.splitlines(), "run: nox -s docs"


def test_commands_exist():
    noxfile = (ROOT / "noxfile.py").read_text()
    assert "nox -s demo" in README
    assert "def demo(" in noxfile
    assert re.search(r"^nox$", README, re.MULTILINE)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_python_example_runs(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    script = tmp_path / "example.py"
    script.write_text(f"path = {str(tmp_path / 'model')!r}\n{example}")
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "model")], check=True)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "snapkv: holds" in done.stdout


SAVE = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from kvdock.testing import tiny_model
words = {word: i for i, word in enumerate(["<pad>", "<unk>", "A", "long", "prompt", "."])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
fast.save_pretrained(sys.argv[1])
tiny_model("llama").save_pretrained(sys.argv[1])
"""
