"""The code of the documentation runs; commands are parsed, and what they name exists."""

import copy
import re

import pytest
import yaml
from blocks import SHELL, blocks, commands, complaint

from kvdock import available
from kvdock.cli_app import app
from kvdock.registry import default_host
from kvdock.testing_models import left_padded, tiny_model

PYTHON = [block for block in blocks("python") if block.page != "docs/writing-a-method.md"]
"""What runs here; that page's code is a package, which `test_writing.py` makes."""
MADE = set(re.findall(r"^kvdock new ([\w-]+)", "\n".join(b.text for b in blocks(*SHELL)), re.M))
COMMANDS = [(block, words) for block in blocks(*SHELL) for words in commands(block.text)]
KVDOCK = re.compile(r"attach\(model, \"([\w+]+)\"")


def named(pairs):
    return [pytest.param(*pair, id=f"{pair[0].name} {' '.join(pair[1])[:60]}") for pair in pairs]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a local folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("model")
    words = {word: n for n, word in enumerate(["<pad>", "<unk>", "A", "long", "prompt", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(place)
    tiny_model("llama").save_pretrained(place)
    return place


def test_the_documentation_has_code():
    assert {block.page for block in PYTHON} >= {"README.md", "README_zh.md", "docs/hooks.md"}
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in PYTHON])
def test_python_runs(block, folder, capsys):
    for methods in KVDOCK.findall(block.text):
        if missing := set(methods.split("+")) - set(available()):
            pytest.skip(f"{', '.join(missing)} is not installed here")
    text, found = re.subn(r"^path = \"[^\"]+\"", f"path = {str(folder)!r}", block.text, flags=re.M)
    assert found or "from_pretrained" not in text
    names = {"__name__": "example"}
    if "model" in text and not found:
        # cards begin where the README's example has loaded its model
        names |= {"model": tiny_model("llama", head_dim=32), "batch": left_padded((70, 33))[0]}
    exec(compile(text, block.name, "exec"), names)
    if "dock.report()" in text:
        assert "holds" in capsys.readouterr().out


def test_the_readmes_example_reports_what_is_held(folder, capsys):
    [first] = [b for b in PYTHON if b.page == "README.md"]
    text = re.sub(r"^path = \"[^\"]+\"", f"path = {str(folder)!r}", first.text, flags=re.M)
    exec(compile(text, first.name, "exec"), {"__name__": "example"})
    assert re.search(r"snapkv: holds .* of", capsys.readouterr().out)


@pytest.mark.versionless
@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in blocks("yaml")])
def test_yaml_is_read(block):
    assert yaml.safe_load(block.text)


@pytest.fixture(scope="session")
def whole_app():
    whole = copy.copy(app)
    failed = default_host().add_commands(whole)
    assert failed == {}
    return whole


@pytest.mark.versionless
@pytest.mark.parametrize(("block", "words"), named(COMMANDS))
def test_commands_name_what_exists(block, words, whole_app):
    assert complaint(words, whole_app, MADE) is None


@pytest.mark.versionless
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("kvdock list", None),
        ("kvdock show snapkv && nox", None),
        ("kvdock lst", "no command"),
        ("kvdock bench --no_such_flag 1", "no_such_flag"),
        ("nox -s demo", None),
        ("nox -s dem", "no session"),
        ("nox -t isolation-x", "no tag"),
        ("pip install ./core ./plugins/snapkv", None),
        ("pip install kvdock-kivi[triton]", None),
        ("pip install ./plugins/nothing", "no distribution"),
        ("pip install kvdock-nothing", "no package"),
        ("pip install kvdock-snapkv[fast]", "no extra"),
        ("uv pip install -c envs/nothing.txt -e core", "no file"),
        ("python benchmarks/nothing.py", "there is no"),
        ("make all", "unknown program"),
    ],
)
def test_the_check_finds_what_is_wrong(line, wrong, whole_app):
    found = [complaint(words, whole_app) for words in commands(line)]
    assert any(wrong in (text or "") for text in found) if wrong else not any(found)
