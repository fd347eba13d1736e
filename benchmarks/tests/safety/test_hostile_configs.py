"""Configs and data files of strangers: one documented error, short, and at once."""

import json

import pytest
from fuzzing import listing

from kvdock.errors import KVDockError
from kvdock_bench.config import load_config, make_config
from kvdock_bench.errors import BenchError
from kvdock_bench.folder import check_tag, default_tag, open_run
from kvdock_bench.haystack import load_haystack
from kvdock_bench.methods import FULL_CACHE
from kvdock_bench.plan import make_plan
from kvdock_bench.qa_files import load_official, load_questions
from kvdock_bench.sources import load_data

pytestmark = pytest.mark.versionless

NAMES = {
    "parent": "../x",
    "absolute": "/etc/passwd",
    "backslash": "a\\b",
    "drive": "C:x",
    "device": "CON",
    "device with suffix": "nul.txt",
    "port": "com1",
    "long": "x" * 300,
    "trailing dot": "x.",
    "trailing space": "x ",
    "leading dot": ".x",
    "nul": "a\0b",
    "newline": "a\nb",
    "last newline": "a\n",
    "direction": "a\u202eb",
    "wide": "ａ",
    "dots": "..",
    "empty": "",
    "flag": "-rf",
    "home": "~root",
}


@pytest.mark.parametrize("tag", NAMES.values(), ids=NAMES)
def test_a_tag_is_one_plain_name_or_refused(tmp_path, tag):
    with pytest.raises(BenchError, match="--save_tag") as error:
        open_run(tmp_path, tag, resume=False, overwrite=False)
    assert len(str(error.value)) < 400
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_default_tag_is_always_a_good_one(name):
    for tag in (default_tag(name, "RULER"), default_tag("model", name), default_tag(name, name)):
        assert check_tag(tag) == tag


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_task_of_a_file_is_named_plainly_or_refused(tmp_path, name):
    """The run folder adds a length and a suffix, so that no device or trailing dot remains."""
    path = tmp_path / "own.yaml"
    content = {"benchmark_name": "own", "jsonl": {name: {"path": "law.jsonl"}}}
    path.write_text(json.dumps(content))
    if name in ("CON", "nul.txt", "com1", "x."):
        assert load_config(path).task_names == (name,)
        return
    with pytest.raises(BenchError, match="is not made of letters, digits"):
        load_config(path)


@pytest.mark.parametrize(
    "key", ["task_names: [{}]", "benchmark_name: {}", "no_template_tasks: [{}]"]
)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_unknown_tasks_and_suites_are_told_shortly(tmp_path, key, name):
    path = tmp_path / "own.yaml"
    path.write_text(key.format(json.dumps(name)))
    with pytest.raises(BenchError) as error:
        load_config(path)
    assert len(str(error.value)) < 3000


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
)
KEYS = [
    "jsonl", "benchmark_name", "task_names", "length", "num_samples", "template",
    "no_template_tasks", "answer_prefix", "question", "max_length", "generation", "batch_size",
    "seed", "data", "task_args", "extends",
]  # fmt: skip
HOSTILE = {
    "cycle of lists": "&a [*a]",
    "cycle of mappings": "&a {{{key}: *a, vt: *a}}",
    "deep": "[" * 900 + "]" * 900,
    "deep mappings": "{a: " * 300 + "1" + "}" * 300,
    "merge": "&a {<<: *a}",
    "many digits": "9" * 5000,
    "hexadecimal": "0x" + "f" * 5000,
    "binary digits": "0b" + "1" * 20000,
    "sexagesimal": "1" + ":59" * 2000,
    "large": "1.0e+400",
    "negative": "-" + "9" * 4000,
    "binary": "!!binary " + "QUFB" * 10000,
    "binary nul": "!!binary AAAA",
    "set": "!!set {a, b}",
    "ordered": "!!omap [a: 1]",
    "pairs": "!!pairs [a: 1]",
    "timestamp": "2001-12-14t21:59:43.10-05:00",
    "bad timestamp": "2001-13-45",
    "python": "!!python/object/apply:os.system ['touch hacked']",
    "python tuple": "!!python/tuple [a]",
    "own tag": "!evil x",
    "list of key": "{{? [a, b] : c}}",
    "nan": ".nan",
    "infinity": "-.inf",
    "nul": '"a\\0b"',
    "half": '"\\ud800"',
    "direction": '"\\u202e"',
    "null": "~",
    "twice": "{{a: 1, a: 2}}",
}


@pytest.mark.parametrize("key", KEYS)
def test_each_key_takes_hostile_values(tmp_path, monkeypatch, key):
    """A value is either understood, or refused in a message of readable size."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    for name, value in {**HOSTILE, "bomb": "*a29"}.items():
        value = value.replace("{{", "{").replace("}}", "}").replace("{key}", key)
        path.write_text(f"{BOMB}\n{key}: {value}\n" if name == "bomb" else f"{key}: {value}\n")
        before = listing(tmp_path)
        told = ""
        try:
            config = load_config(path)
            make_plan(config, [FULL_CACHE], load_data(config.data))
            repr(config), str(config.seed), config.model_dump_json()
        except KVDockError as error:
            told = str(error)
        assert len(told) < 20_000, name
        assert listing(tmp_path) == before, name


@pytest.mark.parametrize(
    "raw", [b"seed: 1\0", b"\xff\xfe", b"seed: '\xed\xa0\x80'", b"\x80", b"a: \x1b"]
)
def test_bytes_that_are_no_text_are_refused(tmp_path, raw):
    path = tmp_path / "own.yaml"
    path.write_bytes(raw)
    with pytest.raises(BenchError, match=r"own\.yaml"):
        load_config(path)


def test_keys_written_twice_are_refused_at_every_depth(tmp_path):
    path = tmp_path / "own.yaml"
    for text in ("seed: 1\n'seed': 2", "task_args: {vt: {num_hops: 1, num_hops: 2}}"):
        path.write_text(text)
        with pytest.raises(BenchError, match="written twice"):
            load_config(path)


JSON_ODD = {
    "nul": b"\0\0\0",
    "not utf-8": b'{"prompt": "\xff", "references": ["a"]}',
    "utf-16": '{"prompt": "x", "references": ["a"]}'.encode("utf-16"),
    "half": b'{"prompt": "\\ud800", "references": ["a"]}',
    "deep": b"[" * 100_000,
    "digits": b'{"prompt": ' + b"9" * 5000 + b"}",
    "large": b'{"prompt": 1e400, "references": ["a"]}',
    "nan": b'{"prompt": NaN, "references": ["a"]}',
    "text": b'"prompt"',
    "needs a likelihood": b'{"prompt": "x", "references": ["a"], "metric": "token_probability"}',
    "needs ranks": b'{"prompt": "x", "references": ["a"], "metric": "next_token"}',
}


@pytest.mark.parametrize("raw", JSON_ODD.values(), ids=JSON_ODD)
def test_a_task_file_names_its_line(tmp_path, raw):
    (tmp_path / "law.jsonl").write_bytes(b'{"prompt": "x", "references": ["a"]}\n' + raw + b"\n")
    (tmp_path / "own.yaml").write_text("benchmark_name: own\njsonl: {law: {path: law.jsonl}}\n")
    config = load_config(tmp_path / "own.yaml")
    with pytest.raises(BenchError, match=r"law\.jsonl, line 2: "):
        make_plan(config, [FULL_CACHE], load_data(config.data))


@pytest.mark.parametrize("metric", ["token_probability", "next_token"])
def test_a_metric_of_likelihoods_is_for_the_suites_own_tasks(tmp_path, metric):
    path = tmp_path / "own.yaml"
    path.write_text(f"benchmark_name: own\njsonl: {{law: {{path: x, metric: {metric}}}}}\n")
    with pytest.raises(BenchError, match="Unknown metric"):
        load_config(path)


ROW = {"context": "c", "input": "q", "answers": ["a"], "language": "en", "all_classes": ["a"]}
LONGBENCH_ODD = {
    **{
        name: raw
        for name, raw in JSON_ODD.items()
        if name not in ("needs a likelihood", "needs ranks")
    },
    "answers of numbers": json.dumps(ROW | {"answers": [3]}).encode(),
    "half an answer": json.dumps(ROW | {"answers": ["\ud800"]}).encode(),
    "no classes": json.dumps(ROW | {"all_classes": None}).encode(),
    "classes of numbers": json.dumps(ROW | {"all_classes": [1]}).encode(),
    "language of a number": json.dumps(ROW | {"language": 3}).encode(),
}


@pytest.mark.parametrize("raw", LONGBENCH_ODD.values(), ids=LONGBENCH_ODD)
def test_longbench_files_are_checked(tmp_path, raw):
    (tmp_path / "trec.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + raw + b"\n")
    content = {"benchmark_name": "LongBench", "task_names": ["trec"]}
    config = make_config({**content, "data": {"longbench": f"file:{tmp_path}"}}, "test")
    with pytest.raises(BenchError, match=r"trec\.jsonl(, line 2)?: "):
        make_plan(config, [FULL_CACHE], load_data(config.data))


QA_ODD = [
    b"\0", b"\xff", b"[" * 100_000, b"{}", b"[]", b"3", b"null", b'"x"', b"[1]",
    b'[{"question": 1}]',
    b'{"data": 3}', b'{"data": [3]}', b'{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}',
    b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 3, "answers": [{"text": 3}],'
    b' "is_impossible": false}]}]}]}',
    b'[{"question": "q", "answer": 3, "context": [["t", ["l"]]], "supporting_facts": [["t", 0]]}]',
    b'[{"question": "q", "answer": "\\ud800", "context": [["t", ["l"]]], "supporting_facts": []}]',
    b'{"data": [{"paragraphs": [{"context": {}, "qas": []}]}]}',
]  # fmt: skip


@pytest.mark.parametrize("load", [load_questions, load_official])
@pytest.mark.parametrize("raw", QA_ODD, ids=[str(n) for n in range(len(QA_ODD))])
def test_question_files_are_checked(tmp_path, load, raw):
    path = tmp_path / "qa.json"
    path.write_bytes(raw)
    with pytest.raises(BenchError, match=r"data\.qa: "):
        load(f"file:{path}")


@pytest.mark.parametrize("load", [load_questions, load_official, load_haystack])
@pytest.mark.parametrize(
    "name", ["x" * 300, "~nobody-of-this-name/x", "a\0b", "", "/", "/proc/self/mem"]
)
def test_places_that_cannot_be_read_are_told(load, name):
    with pytest.raises(BenchError, match=r"data\.(qa|haystack): "):
        load(f"file:{name}")


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 999,
        b"[" * 100_000,
        b'{"text": 3}',
        b"[]",
        b'{"text": "' + b"\\ud800 " * 200 + b'"}',
    ],
    ids=["bytes", "deep", "number", "list", "half"],
)
def test_a_haystack_is_checked(tmp_path, raw):
    path = tmp_path / "essays.json"
    path.write_bytes(raw)
    with pytest.raises(BenchError, match=r"data\.haystack: "):
        load_haystack(f"file:{path}")


def test_an_answer_that_names_no_paragraph_is_refused_before_anything_runs(tmp_path):
    """What a metric cannot score would end a run after its first answer."""
    line = {"prompt": "x", "references": ["none"], "metric": "retrieval"}
    (tmp_path / "law.jsonl").write_text(json.dumps(line))
    (tmp_path / "own.yaml").write_text("benchmark_name: own\njsonl: {law: {path: law.jsonl}}\n")
    config = load_config(tmp_path / "own.yaml")
    with pytest.raises(BenchError, match=r"law\.jsonl, sample 0: .*names no paragraph"):
        make_plan(config, [FULL_CACHE], load_data(config.data))
