"""The bridge to lm-eval, with its own classes and its own command line."""

import contextlib
import json
import os
import random
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("lm_eval", reason="needs the extra kvdock-bench[lm-eval]")
pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("default")]

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import LogitsProcessor, LogitsProcessorList  # noqa: E402

import kvdock  # noqa: E402
from kvdock_bench.errors import BenchError  # noqa: E402
from kvdock_bench.harness.command import register  # noqa: E402
from kvdock_bench.harness.model import KVDockLM  # noqa: E402

COMPRESSING = {
    "snapkv": {"method": "snapkv", "budget": 12, "window": 4, "kernel": 3},
    "streamingllm": {"method": "streamingllm", "budget": 12},
    "kivi": {"method": "kivi", "kivi.group_size": 32, "kivi.residual_length": 32},
    "snapkv+kivi": {
        "method": "snapkv+kivi",
        "budget": 64,
        "snapkv.window": 4,
        "kivi.group_size": 32,
        "kivi.residual_length": 32,
    },
}


def words(generator, count):
    return " ".join(f"w{generator.randrange(120)}" for _ in range(count))


def requests(kind="loglikelihood"):
    """Contexts of several lengths; two continuations share one, one has no context."""
    draw = random.Random(3)
    contexts = [words(draw, n) for n in (80, 97, 66, 1)]
    pairs = [
        (context, " " + words(draw, n)) for context, n in zip(contexts, (1, 5, 3, 4), strict=True)
    ]
    pairs += [(contexts[0], " " + words(draw, 6)), (contexts[0], " w7"), ("", words(draw, 3))]
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def scores(model, asked=None):
    return model.loglikelihood(asked or requests(), disable_tqdm=True)


def test_weights_are_safetensors_and_code_runs_only_if_asked(folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(HFLM, "__init__", lambda self, *_, **given: seen.append(given))
    monkeypatch.setattr(KVDockLM, "_attached", lambda self: contextlib.nullcontext())
    KVDockLM(str(folder))
    assert "trust_remote_code" not in capsys.readouterr().err
    KVDockLM(str(folder), trust_remote_code=True, use_safetensors=False)
    assert "Warning: --trust_remote_code" in capsys.readouterr().err
    assert [given["use_safetensors"] for given in seen] == [True, True]
    assert [given.get("trust_remote_code") for given in seen] == [None, True]


def close(ours, theirs, tolerance=2e-4):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.fixture(scope="module")
def plain(folder):
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


def make(folder, batch_size=3, **arguments):
    return KVDockLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size, **arguments)


def test_the_registry_has_it_and_the_entry_point_leads_to_it(folder):
    register()
    register()
    assert get_model("kvdock") is KVDockLM
    # the others are still there
    assert get_model("hf") is HFLM
    (point,) = entry_points(group="lm_eval.models", name="kvdock")
    assert point.load() is KVDockLM


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_budget_for_everything_scores_as_lm_eval_does(folder, plain, batch_size):
    close(scores(make(folder, batch_size, method="snapkv", budget=128)), scores(plain))
    close(scores(make(folder, batch_size)), scores(plain))


@pytest.mark.parametrize("name", COMPRESSING)
def test_scores_are_those_of_forced_generation(folder, plain, name):
    """Generate word by word what is scored, from all of a context but its last word."""
    model = make(folder, **COMPRESSING[name])
    asked = [request for request in requests() if len(request.args[0].split()) > 1]
    expected = [forced(model, *request.args) for request in asked]
    close(scores(model, asked), expected)
    full = scores(plain, asked)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, full, strict=True)) > 0.05
    # already the first word of a continuation is predicted from the compressed cache
    assert abs(expected[0][0] - full[0][0]) > 1e-3


class Force(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = tokens
        self.seen = []

    def __call__(self, input_ids, scores):
        target = self.tokens[len(self.seen)]
        logs = torch.log_softmax(scores[0].float(), -1)
        self.seen.append((float(logs[target]), int(logs.argmax()) == target))
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([target]), 0.0)


def forced(model, context, continuation):
    tokens, wanted = model.tok_encode(context), model.tok_encode(continuation.strip())
    force = Force([tokens[-1], *wanted])
    with model._attached():
        model.model.generate(
            input_ids=torch.tensor([tokens[:-1]]),
            attention_mask=torch.ones(1, len(tokens) - 1, dtype=torch.long),
            logits_processor=LogitsProcessorList([force]),
            max_new_tokens=len(force.tokens),
            do_sample=False,
            eos_token_id=-1,
        )
    logs, greedy = zip(*force.seen[1:], strict=True)
    return sum(logs), all(greedy)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_that_of_the_attached_model(folder, plain, batch_size):
    draw = random.Random(5)
    contexts = [words(draw, n) for n in (60, 44, 31, 44)]
    asked = [
        Instance("generate_until", {}, (context, {"until": ["w3"], "max_gen_toks": 9}), i)
        for i, context in enumerate(contexts)
    ]
    settings = COMPRESSING["snapkv"]
    model = make(folder, batch_size, **settings)
    found = model.generate_until(asked, disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = model.tokenizer(context, return_tensors="pt")
        with kvdock.attach(model.model, **{"methods": "snapkv", **settings_of(settings)}):
            output = model.model.generate(**ids, max_new_tokens=9, do_sample=False)
        wanted = model.tokenizer.decode(
            output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert text == wanted.split("w3")[0]
    assert found != plain.generate_until(asked, disable_tqdm=True)


def settings_of(arguments):
    return {name: value for name, value in arguments.items() if name != "method"}


def test_a_context_that_is_too_long_loses_its_beginning(folder, caplog):
    draw = random.Random(9)
    context, continuation = words(draw, 90), " " + words(draw, 4)
    short = make(folder, method="snapkv", budget=12, window=4, kernel=3, max_length=50)
    same = make(folder, method="snapkv", budget=12, window=4, kernel=3)
    whole = [Instance("loglikelihood", {}, (context, continuation), 0)]
    cut = " ".join(context.split()[-47:])
    with caplog.at_level("WARNING"):
        found = scores(short, whole)
    close(found, scores(same, [Instance("loglikelihood", {}, (cut, continuation), 0)]))
    assert "Cut 43 tokens" in caplog.text


def test_the_model_is_given_back_as_it_was(folder, plain):
    model = make(folder, **COMPRESSING["snapkv"])
    scores(model)
    assert "generate" not in model.model.__dict__
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nosuch"}, "pip install kvdock-nosuch"),
        ({"method": "snapkv", "snapkv.windw": 3}, "windw"),
        ({"method": "snapkv", "budget": 0}, "at least 1"),
        ({"method": "snapkv", "kivi.bits": 2}, "option of no method here"),
        ({"snapkv.window": 2}, "There is no method"),
        ({"method": "snapkv", "batch_size": "auto"}, "batch_size=auto"),
    ],
)
def test_wrong_arguments_are_told(folder, arguments, message):
    with pytest.raises(kvdock.errors.KVDockError, match=message):
        KVDockLM(str(folder), **{"device": "cpu", "dtype": "float32", **arguments})


def test_rolling_scores_are_refused_with_a_method(folder, plain):
    asked = [Instance("loglikelihood_rolling", {}, ("w1 w2 w3 w4",), 0)]
    with pytest.raises(BenchError, match="nothing to compress"):
        make(folder, **COMPRESSING["snapkv"]).loglikelihood_rolling(asked, disable_tqdm=True)
    assert make(folder).loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(
        plain.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-4
    )


TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{target}}"
metric_list: [{metric: acc}]
""",
    "answer": """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[target]}}"
generation_kwargs: {until: ["w3"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}


def test_the_command_line_runs_tasks_offline(folder, tmp_path):
    draw = random.Random(11)
    data = tmp_path / "data.jsonl"
    rows = [
        {"context": words(draw, 50), "choices": [words(draw, 2), words(draw, 3)], "target": i % 2}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    arguments = "method=snapkv,budget=12,snapkv.window=4,kernel=3,dtype=float32"
    command = [
        *(sys.executable, "-m", "kvdock", "lm-eval", "--model", "kvdock", "--device", "cpu"),
        *("--model_args", f"pretrained={folder},{arguments}", "--batch_size", "2"),
        *("--include_path", str(tmp_path), "--tasks", "choice,answer"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    model = make(folder, method="snapkv", budget=12, window=4, kernel=3)
    right = 0
    for row in rows:
        asked = [
            Instance("loglikelihood", {}, (row["context"], f" {choice}"), 0)
            for choice in row["choices"]
        ]
        totals = [total for total, _ in scores(model, asked)]
        right += totals.index(max(totals)) == row["target"]
    assert found["choice"]["acc,none"] == pytest.approx(right / len(rows))
    assert 0 <= found["answer"]["exact_match,none"] <= 1
