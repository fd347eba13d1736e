"""Own tasks: a suite of another package, and questions in a JSONL file."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from kvdock_bench.config import load_config
from kvdock_bench.errors import BenchError
from kvdock_bench.fitting import fit_sample
from kvdock_bench.methods import FULL_CACHE
from kvdock_bench.plan import make_plan
from kvdock_bench.prompting import Prompter
from kvdock_bench.scoring import score
from kvdock_bench.tasks import OWN_LENGTH, Suite, get_task, suites

CONFIG = "benchmark_name: own\njsonl: {law: {path: law.jsonl, metric: string_match_part}}\n"
GOOD = {"prompt": "What is it?", "references": ["a", "b"]}


@pytest.fixture
def files(tmp_path):
    def make(*lines, config: str = CONFIG):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "law.jsonl").write_text("\n".join(texts) + "\n")
        (tmp_path / "own.yaml").write_text(config)
        return load_config(tmp_path / "own.yaml")

    return make


def test_lines_become_samples_in_their_order(files, tokenizer, data):
    split = {"context": "Long text.", "question": "Who?", "answer_prefix": " It is"}
    config = files(GOOD, "", {**split, "references": "c", "metric": "string_match_all"})
    assert config.length == (OWN_LENGTH,)
    (task,) = config.tasks
    plan = make_plan(config, [FULL_CACHE], data)
    assert (plan.count("law"), plan.n_samples) == (2, 2)
    prompter = Prompter(tokenizer, config)
    first, second = (
        fit_sample(task, index=i, length=OWN_LENGTH, prompter=prompter, seed=1, data=data)
        for i in range(2)
    )
    assert "<|user|>What is it?<|end|>" in first.prompt.text
    assert second.prompt.text.endswith("Long text.\nWho?<|end|><|assistant|>It is")
    assert first.sample.references == ("a", "b")
    assert score(task.metric, "b", first.sample.references, first.sample.meta) == 1.0
    assert second.sample.meta == {"metric": "string_match_all"}
    described = data.describe([task])
    assert described["tasks"]["law"] == "user file: law.jsonl"
    assert len(described["sha256"]["law"]) == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: .*Expecting"),
        ("[1]", "line 2: expected a JSON object, found list"),
        ('{"prompt": "x"}', "line 2: 'references' is None"),
        ('{"prompt": "x", "references": []}', "line 2: 'references' is "),
        ('{"prompt": "x", "references": [3]}', "line 2: 'references' is "),
        ('{"references": ["a"]}', "line 2: expected either 'prompt' or both"),
        ('{"context": "x", "references": ["a"]}', "line 2: expected either"),
        ('{"prompt": 3, "references": ["a"]}', "line 2: 'prompt' is 3, expected a text"),
        (
            '{"prompt": "x", "references": ["a"], "metric": "f2"}',
            "line 2: Unknown metric 'f2'.*string_match_all",
        ),
    ],
)
def test_an_unreadable_line_is_named_by_its_number(files, data, line: str, message: str):
    config = files(GOOD, line)
    with pytest.raises(BenchError, match=message) as error:
        make_plan(config, [FULL_CACHE], data)
    assert "law.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG.replace("string_match_part", "string_mach"), "Unknown metric.*Did you mean"),
        (CONFIG.replace("own", "ruler", 1), "needs a name of its own"),
        (CONFIG + "length: [512]", "have their own length"),
        (CONFIG.replace("metric", "metrik"), "unknown key 'jsonl.law.metrik'.*'metric'"),
        (CONFIG.replace("law:", "'../law':"), "task name '../law'"),
        (CONFIG + "task_names: [vt]", "Unknown task or group 'vt'.*law"),
    ],
)
def test_a_wrong_config_of_own_files_says_what_is_wrong(files, config: str, message: str):
    with pytest.raises(BenchError, match=message):
        files(GOOD, config=config)


def test_a_missing_and_an_empty_file_are_errors(files, data, tmp_path):
    config = files("")
    with pytest.raises(BenchError, match="no line holds a sample"):
        make_plan(config, [FULL_CACHE], data)
    (tmp_path / "law.jsonl").unlink()
    with pytest.raises(BenchError, match="cannot read .*law.jsonl"):
        make_plan(config, [FULL_CACHE], data)


def test_a_config_extends_another_and_a_circle_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: sub/b.yaml\nseed: 3\ngeneration: {stop: [x]}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("extends: RULER_all\nlength: 4k\nseed: 2\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.seed, config.length, len(config.task_names)) == (3, (4096,), 13)
    assert config.generation.stop == ("x",)
    assert config.generation.max_new_tokens["vt"] == 36
    (tmp_path / "sub" / "b.yaml").write_text("extends: ../a.yaml\n")
    circle = r"in a circle: \S+a\.yaml -> \S+b\.yaml -> \S+a\.yaml"
    with pytest.raises(BenchError, match=circle):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(BenchError, match="circle"):
        load_config(tmp_path / "a.yaml")


OWN_SUITE = Suite("riddles", (get_task("vt"),), fitted=True)


def make_suite() -> Suite:
    return OWN_SUITE


def broken() -> Suite:
    raise RuntimeError("no data here")


def install(monkeypatch, *values: str, name: str = "riddles"):
    module = __name__
    entries = [EntryPoint(name, f"{module}:{value}", suites.SUITE_GROUP) for value in values]
    monkeypatch.setattr(suites, "_entries", lambda: entries)
    monkeypatch.setattr(EntryPoint, "load", lambda entry: globals()[entry.attr])


@pytest.mark.parametrize("value", ["OWN_SUITE", "make_suite"])
def test_another_package_brings_a_suite(monkeypatch, tmp_path, value: str):
    install(monkeypatch, value)
    (tmp_path / "x.yaml").write_text("benchmark_name: Riddles\n")
    config = load_config(tmp_path / "x.yaml")
    assert (config.benchmark_name, config.task_names) == ("riddles", ("vt",))


def test_a_broken_suite_is_named_and_harms_no_other(monkeypatch):
    install(monkeypatch, "broken")
    with pytest.raises(BenchError, match="'riddles' of .*no data here"):
        suites.get_suite("riddles")
    assert suites.get_suite("ruler").name == "RULER"
    install(monkeypatch, "CONFIG")
    with pytest.raises(BenchError, match="expected a kvdock_bench.tasks.Suite"):
        suites.get_suite("riddles")
    install(monkeypatch, "OWN_SUITE", "make_suite")
    with pytest.raises(BenchError, match="claimed by .* and "):
        suites.get_suite("riddles")
