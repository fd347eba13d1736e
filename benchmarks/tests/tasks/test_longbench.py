"""LongBench's prompts, files and scores, on small made-up rows."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from kvdock_bench.config import load_config, make_config
from kvdock_bench.errors import BenchError
from kvdock_bench.fitting import fit_sample
from kvdock_bench.methods import FULL_CACHE
from kvdock_bench.plan import make_plan
from kvdock_bench.prompting import Prompter
from kvdock_bench.scoring import METRICS, score
from kvdock_bench.sources import load_data
from kvdock_bench.tasks import OWN_LENGTH, get_suite

TASKS = get_suite("LongBench").tasks
TASKS_BY_NAME = {task.name: task for task in TASKS}
LONG = "one two three four five six seven eight nine ten " * 12


def row(**changes):
    plain = {"context": "Some text.", "input": "Who?", "answers": ["Ann", "Bob"], "language": "en"}
    return plain | {"all_classes": ["a", "b"], "length": 3, "dataset": "x", "_id": "0"} | changes


@pytest.fixture
def rendered(tmp_path, tokenizer):
    def make(task: str, template: str | None = "auto", **changes):
        lines = [json.dumps(row(**changes)), json.dumps(row())]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
        keys = {key: changes.pop(key) for key in ("max_length",) if key in changes}
        config = make_config(
            {
                "benchmark_name": "longbench",
                "task_names": [task],
                "template": template,
                "data": {"longbench": f"file:{tmp_path}"},
                **keys,
            },
            "test",
        )
        data = load_data(config.data)
        assert make_plan(config, [FULL_CACHE], data).counts == {task: 2}
        prompter = Prompter(tokenizer, config)
        (chosen,) = config.tasks
        return fit_sample(chosen, index=0, length=OWN_LENGTH, prompter=prompter, seed=0, data=data)

    return make


def test_all_tasks_have_a_known_metric_and_their_answer_lengths():
    assert len(TASKS) == 21
    assert {task.metric for task in TASKS} <= set(METRICS)
    lengths = {task.name: task.max_new_tokens for task in TASKS}
    assert sum(lengths.values()) == 3168
    assert (lengths["gov_report"], lengths["hotpotqa"], lengths["samsum"]) == (512, 32, 128)
    assert load_config("LongBench").length == (OWN_LENGTH,)
    assert len(load_config("LongBench").task_names) == 16
    for task in TASKS:
        assert task.context.count("{context}") == 1
        assert "{context}" not in task.rest
        needs_input = task.name not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
        assert task.rest.count("{input}") == needs_input


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_each_prompt_holds_its_parts_and_braces_survive(rendered, task: str):
    fitted = rendered(task, None, context="def f(): return {input}", input="{context}?")
    text = fitted.prompt.text
    assert text.count("def f(): return {input}") == 1
    assert fitted.sample.references == ("Ann", "Bob")
    assert not any(mark in text.replace("{input}", "").replace("{context}?", "") for mark in "{}")


def test_few_shot_and_code_prompts_get_no_chat_template(rendered):
    raw = [task.name for task in TASKS if "<|user|>" not in rendered(task.name).prompt.text]
    assert sorted(raw) == ["lcc", "lsht", "repobench-p", "samsum", "trec", "triviaqa"]
    assert rendered("lcc", context="x = 1\n").prompt.text == (
        "Please complete the code given below. \nx = 1\nNext line of code:\n"
    )


def test_the_middle_is_cut_before_the_template(rendered):
    whole = rendered("hotpotqa", context=LONG)
    cut = rendered("hotpotqa", context=LONG, max_length=60)
    assert whole.prompt.n_tokens > 150
    # the template's own tokens come on top
    assert 60 < cut.prompt.n_tokens < 75
    assert cut.prompt.text.startswith("<s><|user|>Answer the question based on")
    assert cut.prompt.text.endswith("Question: Who?\nAnswer:<|end|><|assistant|>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        (json.dumps(row()) + "\n[]", "line 2: expected a JSON object"),
        (json.dumps(row(answers="Ann")), "line 1: 'answers' is 'Ann', not a list"),
        (json.dumps(row(answers=[])), "line 1: 'answers' is empty"),
        (json.dumps(row(context=None)), "line 1: 'context' is None"),
        ("", "no line holds a sample"),
        (None, "cannot read .*qasper.jsonl"),
    ],
)
def test_broken_files_are_named(tmp_path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "qasper.jsonl").write_text(text)
    keys = {"benchmark_name": "LongBench", "task_names": ["qasper"]}
    config = make_config({**keys, "data": {"longbench": f"file:{tmp_path}"}}, "test")
    with pytest.raises(BenchError, match=message):
        make_plan(config, [FULL_CACHE], load_data(config.data))
    config = make_config(keys, "test")
    with pytest.raises(BenchError, match="Set data.longbench to 'file:FOLDER'"):
        make_plan(config, [FULL_CACHE], load_data(config.data))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("source", ["hub", "hub@main", f"hub@{COMMIT[:7]}", f"hub@{COMMIT}0", "x"])
def test_a_download_has_to_name_its_commit(source: str):
    keys = {"benchmark_name": "LongBench", "task_names": ["qasper"]}
    with pytest.raises(BenchError, match="longbench: expected 'file:FOLDER', or 'hub@' and"):
        make_config({**keys, "data": {"longbench": source}}, "test")


def test_the_archive_of_that_commit_is_read(tmp_path, monkeypatch):
    asked = []

    def download(name, file, **given):
        asked.append((name, file, given))
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as packed:
            packed.writestr("data/qasper.jsonl", json.dumps(row()) + "\n")
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    keys = {"benchmark_name": "LongBench", "task_names": ["qasper", "triviaqa"]}
    config = make_config({**keys, "data": {"longbench": f"hub@{COMMIT}"}}, "test")
    data = load_data(config.data)
    described = data.describe([TASKS_BY_NAME["qasper"]])
    assert described["tasks"]["qasper"] == f"hub: zai-org/LongBench at {COMMIT}"
    assert len(described["sha256"]["qasper"]) == 64
    given = {"repo_type": "dataset", "revision": COMMIT}
    assert asked == [("zai-org/LongBench", "data.zip", given)]
    with pytest.raises(BenchError, match=rf"cannot get triviaqa.jsonl of \S+ at {COMMIT}"):
        data.longbench.rows("triviaqa")


PACKAGES = {"rouge": ("rouge_l", "rouge_l_zh"), "jieba": ("rouge_l_zh", "qa_f1_zh")}

# Worked out by hand from the definitions; where a case shows an oddity, the comment says which.
CASES = [
    ("qa_f1", "The cat.", ["a CAT", "dog"], {}, 1.0),
    ("qa_f1", "Paris is nice", ["paris"], {}, 0.5),
    ("qa_f1", "Paris\nnot", ["Paris"], {"first_line": True}, 1.0),
    ("qa_f1", "", ["x"], {}, 0.0),
    ("qa_f1", "well-known", ["wellknown"], {}, 1.0),
    ("qa_f1_zh", "北京。", ["北京"], {}, 1.0),
    ("qa_f1_zh", "北京", ["上海"], {}, 0.0),
    ("rouge_l", "the cat sat", ["the cat sat"], {}, 0.999999995),
    ("rouge_l", "a b c d", ["a c"], {}, 2 / 3),
    ("rouge_l", "", ["a c"], {}, 0.0),
    ("rouge_l", ".", ["a c"], {}, 0.0),
    ("rouge_l_zh", "我爱北京", ["我爱北京"], {}, 0.999999995),
    ("classification", "It is Food", ["Food"], {"classes": ["Food", "Animal"]}, 1.0),
    ("classification", "Food or Animal", ["Food"], {"classes": ["Food", "Animal"]}, 0.5),
    ("classification", "Animal", ["Food"], {"classes": ["Food", "Animal"]}, 0.0),
    ("classification", "Other city", ["Other city"], {"classes": ["city", "Other city"]}, 1.0),
    # the second part of the reference stays, because the walk skips what follows a dropped one
    (
        "classification",
        "Big red city",
        ["Big red city"],
        {"classes": ["Big", "red", "Big red city"]},
        0.5,
    ),
    ("count", "There are 7, not 8", ["7"], {}, 0.5),
    ("count", "seven", ["7"], {}, 0.0),
    ("count", "07", ["7"], {}, 0.0),
    ("retrieval", "Paragraph 12", ["Paragraph 12"], {}, 1.0),
    ("retrieval", "12 or 13 or 12", ["Paragraph 12"], {}, 2 / 3),
    ("retrieval_zh", "段落3", ["段落3"], {}, 1.0),
    ("code_similarity", "\n# note\nx = 1\ny", ["x = 1"], {}, 1.0),
    ("code_similarity", "abcd", ["abce"], {}, 0.75),
    ("code_similarity", "# only a note", ["x"], {}, 0.0),
    ("word_overlap", "Near the bakery!", ["the blue bakery"], {}, 2 / 3),
    ("token_probability", "", ["x"], {"nll": 0.0}, 1.0),
    ("next_token", "", ["x"], {"ranked_first": 0.25}, 0.25),
]


# What the official functions gave (with difflib's ratio for code); jieba 0.42.1, rouge 1.0.1.
GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden_longbench.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "meta", "expected"), [*CASES, *GOLDEN]
)
def test_scores(metric: str, prediction: str, references: list[str], meta: dict, expected: float):
    for package, names in PACKAGES.items():
        if metric in names:
            pytest.importorskip(package)
    assert score(metric, prediction, references, meta) == pytest.approx(expected, abs=1e-8)


def test_a_reference_without_a_paragraph_is_refused():
    with pytest.raises(BenchError, match="names no paragraph"):
        score("retrieval", "1", ["none"])
