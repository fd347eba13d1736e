"""The needle lies where its sample says, at every length; judged texts are the same at all."""

from __future__ import annotations

import pytest

from kvdock_bench.config import make_config
from kvdock_bench.context import check_lengths, check_prompt
from kvdock_bench.errors import BenchError
from kvdock_bench.fitting import fit_sample
from kvdock_bench.prompting import Prompter
from kvdock_bench.tasks import get_suite


def fitted(tokenizer, data, suite: str, task: str, length: int, index: int, **args):
    config = make_config({"benchmark_name": suite, "task_args": {task: args}}, "test")
    (chosen,) = [one for one in get_suite(suite).tasks if one.name == task]
    prompter = Prompter(tokenizer, config)
    return fit_sample(chosen, index=index, length=length, prompter=prompter, seed=1, data=data)


@pytest.mark.parametrize("length", [512, 2048])
def test_depths_go_from_start_to_end_and_repeat_elsewhere(tokenizer, data, length: int):
    starts = set()
    for index in range(22):
        made = fitted(tokenizer, data, "NIAH", "needle", length, index)
        assert made.sample.meta["depth"] == pytest.approx(index % 11 / 10)
        text = made.sample.context.split("\n", 1)[1]
        place = text.index("The best place in Riverton") / len(text)
        assert place == pytest.approx(made.sample.meta["depth"], abs=130 / length)
        assert 0.99 * length <= made.prompt.n_tokens + 50 <= length
        if index % 11 > 0:
            starts.add(text[:40])
    assert len(starts) == 2


def test_own_needles_and_depths(tokenizer, data):
    own = {"needle": "Zed hid a red fox.", "answer": "a red fox", "retrieval_question": "What?"}
    grid = {"document_depth_percent_min": 20, "document_depth_percent_intervals": 3}
    made = fitted(tokenizer, data, "niah", "needle", 512, 1, **own, **grid)
    assert made.sample.meta["depth"] == 0.6
    assert made.sample.references == ("a red fox",)
    assert "Question: What?" in made.prompt.text
    for wrong in ({"needle": " "}, {"answer": 3}, {"document_depth_percent_intervals": 0}):
        with pytest.raises(BenchError, match="needle"):
            fitted(tokenizer, data, "NIAH", "needle", 512, 0, **wrong)


def test_the_judged_words_are_the_same_at_every_length(tokenizer, data):
    short, long = (
        fitted(tokenizer, data, "perplexity", "perplexity", n, 3, words=40) for n in (512, 1024)
    )
    assert short.prompt.n_tail == long.prompt.n_tail > 40
    tail = short.prompt.n_tail
    assert short.prompt.input_ids[-tail:] == long.prompt.input_ids[-tail:]
    assert long.sample.context.endswith(short.sample.context)
    assert short.prompt.text.endswith(short.sample.context + " " + short.sample.references[0])
    other = fitted(tokenizer, data, "perplexity", "next_token", 512, 3, words=40)
    assert other.sample.references == short.sample.references


def test_what_exceeds_the_context_is_refused():
    config = make_config({"length": [512, 4096], "task_names": ["vt"]}, "test")
    check_lengths(config, 4096)
    check_lengths(config, None)
    with pytest.raises(BenchError, match="length 4096: vt .* context has 2048.*--max_length 2018"):
        check_lengths(config, 2048)
    check_lengths(make_config({"length": 4096, "max_length": 1000}, "test"), 2048)
    check_prompt("law, sample 3", 90, 10, 100)
    with pytest.raises(BenchError, match="law, sample 3: the prompt has 91 tokens"):
        check_prompt("law, sample 3", 91, 10, 100)
