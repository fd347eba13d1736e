"""Configs say what they mean, and every mistake is named with a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvdock.errors import KVDockError
from kvdock_bench.config import BenchConfig, load_config, override, packaged_configs
from kvdock_bench.errors import BenchError
from kvdock_bench.tasks import GROUPS, get_task


@pytest.fixture
def write(tmp_path):
    def make(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def test_packaged_configs_load_by_any_case():
    rulers = ["RULER", "RULER_all", "RULER_reference", "demo"]
    assert set(packaged_configs()) == {"LongBench", "NIAH", "perplexity", *rulers}
    for name in packaged_configs():
        config = load_config(name)
        assert config == load_config(name.lower()) == load_config(name.upper())
        if name in rulers:
            assert set(config.generation.max_new_tokens) == set(config.task_names)
    assert load_config("ruler").task_names == GROUPS["light"]
    assert load_config("RULER").length == (512, 1024, 2048)
    assert load_config("RULER_all").task_names == GROUPS["all"]
    assert load_config("RULER_reference").task_names == GROUPS["all"]
    assert load_config("demo").length == (512, 1024)


def test_everything_a_file_can_say(write):
    config = load_config(
        write(
            "benchmark_name: ruler\n"
            "task_names: all\n"
            "lengths: [4k, '8K', 512, 4096]\n"
            "num_samples: 3\n"
            "template: null\n"
            "no_template_tasks: [qa]\n"
            "answer_prefix: in_user\n"
            "max_length: 1k\n"
            "generation: {max_new_tokens: {vt: 36}, do_sample: true, stop: ['\\n']}\n"
            "batch_size: auto\n"
            "seed: 7\n"
            "data: {haystack: 'file:a.txt', qa: ['file:b.json', 'file:c.json']}\n"
            "task_args: {vt: {num_hops: 2, one_shot: false}, fwe: {alpha: 1.5}}\n"
        )
    )
    assert config.benchmark_name == "RULER"
    assert config.length == (512, 4096, 8192)
    assert config.no_template_tasks == ("qa_1", "qa_2")
    assert config.max_length == 1024
    assert config.max_new_tokens(get_task("vt")) == 36
    assert config.max_new_tokens(get_task("cwe")) == 120
    assert config.args_for(get_task("vt")) == {"num_chains": 1, "num_hops": 2, "one_shot": False}
    assert BenchConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_config_in_the_readme_loads(write):
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1]
    config = load_config(write(block))
    assert set(type(config).model_fields) == set(re.findall(r"^(\w+):", block, re.MULTILINE))


def test_defaults_are_the_light_group_with_the_chat_template(write):
    config = load_config(write(""))
    assert config.task_names == GROUPS["light"]
    assert (config.template, config.answer_prefix) == ("auto", "after_header")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_sample: 3", "unknown key 'num_sample' .value 3.. Did you mean 'num_samples'"),
        ("generation: {max_new_token: 3}", "'generation.max_new_token'.*'max_new_tokens'"),
        ("data: {heystack: austen}", "'data.heystack'.*Did you mean 'haystack'"),
        ("task_names: [niah_singel_1]", "'niah_singel_1'. Did you mean 'niah_single_1'"),
        ("task_names: [../../etc]", "Unknown task or group '../../etc'"),
        ("task_names: []", "at least one task"),
        ("task_names: [3]", "task_names: write task or group names"),
        ("task_names: {vt: 1}", "task_names: write task or group names"),
        ("length: [0]", "length: a length lies between 1"),
        ("length: [-4]", "length: a length lies between 1"),
        ("length: []", "length: name at least one"),
        ("length: 4 parsecs", "length: a length is a number of tokens.*'4 parsecs'"),
        ("length: [4.5]", "length: a length is a number"),
        ("length: [true]", "length: a length is a number"),
        ("num_samples: 0", "num_samples: .*greater than or equal to 1; found 0"),
        ("num_samples: ten", "num_samples: .*valid integer; found 'ten'"),
        ("answer_prefix: before", "answer_prefix: .*'after_header'.*found 'before'"),
        ("benchmark_name: RULES", "Unknown benchmark 'RULES'. Did you mean 'RULER'"),
        ("generation: {max_new_tokens: {vtt: 3}}", "Unknown task 'vtt'. Did you mean 'vt'"),
        ("generation: {max_new_tokens: 0}", "generation.max_new_tokens"),
        ("generation: 5", "generation: "),
        ("data: {haystack: books}", "data.haystack: a data source is 'austen' or 'file:PATH'"),
        ("data: {qa: 'file:'}", "data.qa: a data source is 'synthetic' or 'file:PATH'"),
        ("task_args: {vt: {hops: 2}}", "vt.hops is unknown. Did you mean 'num_hops'"),
        ("task_args: {vt: {num_hops: 200}}", "vt.num_hops is 200; expected .* 1 to 20"),
        ("task_args: {vt: {one_shot: 3}}", "vt.one_shot is 3; expected true or false"),
        ("task_args: {cwe: {num_cw: yes}}", "cwe.num_cw is True"),
        ("task_args: {qa_1: {hops: 2}}", "qa_1 takes no arguments"),
        ("task_args: {nope: {}}", "Unknown task 'nope'"),
        ("batch_size: -1", "batch_size: "),
        ("seed: x", "seed: "),
        ("- a\n- b", "expected `key: value` lines"),
        ("just text", "expected `key: value` lines"),
        ("1: 2", "expected `key: value` lines"),
        ("seed: 1\nseed: 2", "written twice"),
        ("seed: [1", "not plain YAML"),
        ("? {a: 1}\n: 2", "not plain YAML|expected `key: value`"),
    ],
)
def test_mistakes_name_file_key_value_and_way_out(write, text: str, message: str):
    path = write(text)
    with pytest.raises(BenchError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert isinstance(error.value, KVDockError)


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch hacked']",
        "seed: !!python/name:os.system",
        "!!python/object/new:kvdock_bench.config.BenchConfig {}",
        "template: !!python/object/apply:subprocess.check_output [['id']]",
    ],
)
def test_python_tags_are_refused(write, tmp_path, monkeypatch, text: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match="not plain YAML"):
        load_config(write(text))
    assert not (tmp_path / "hacked").exists()


def test_a_yaml_bomb_ends_in_a_short_message(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(BenchError) as error:
        load_config(write("\n".join([*lines, "task_names: *a29", "length: *a29"])))
    assert len(str(error.value)) < 20_000
    with pytest.raises(BenchError):
        load_config(write("[" * 20_000))


def test_missing_large_and_binary_files(write, tmp_path):
    with pytest.raises(BenchError, match=r"Did you mean 'RULER'.*RULER_all, .*demo"):
        load_config("RULLER")
    with pytest.raises(BenchError, match="No config"):
        load_config(tmp_path)
    with pytest.raises(BenchError, match="No config"):
        load_config("../configs/\0demo")
    with pytest.raises(BenchError, match="larger than 1 MiB"):
        load_config(write("#" * (1 << 20) + "\n"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError):
        load_config(tmp_path / "bytes.yaml")


def test_overrides_are_checked_like_the_file():
    config = override(load_config("demo"), num_samples=2, max_length="1k", task_names="vt")
    assert (config.num_samples, config.max_length, config.task_names) == (2, 1024, ("vt",))
    with pytest.raises(BenchError, match="command line: num_samples"):
        override(config, num_samples=0)
    with pytest.raises(BenchError, match="Did you mean 'seed'"):
        override(config, sead=1)
