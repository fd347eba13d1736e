"""`compat: ruler` draws what RULER's scripts draw; facts of published samples are the oracle."""

from __future__ import annotations

import json
import re

import pytest

from kvdock_bench.config import make_config
from kvdock_bench.errors import BenchError
from kvdock_bench.fitting import fit_sample
from kvdock_bench.prompting import Prompter
from kvdock_bench.sources import load_data
from kvdock_bench.tasks import get_task

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a} says fact{a}{p} plainly.",
                    "qas": [
                        {
                            "question": f"What says {p} of {a}?",
                            "answers": [{"text": f"fact{a}{p}"}] * 2,
                            "is_impossible": False,
                        },
                        {"question": "Impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(6)
            ],
        }
        for a in range(30)
    ]
}
HOTPOT = [
    {
        "question": f"Which city for {n}?",
        "answer": f"City{n}",
        "supporting_facts": [["A", 0]],
        "context": [["A", [f"A{n} is in City{n}."]], ["B", [f"B{n} is not."]]],
    }
    for n in range(30)
]

# The first samples of a published niah_multikey_3 at 4096 tokens (seed 42; github.com/Zefan-Cai/
# PyramidKV, data/RULER): first and last line's key and value, key asked for, answer.
PUBLISHED = [
    (
        ("1e9b23bc-50c7-4006-b14d-3441b8a6171f", "c31edbbc-f36c-462b-892e-6161be2d740a"),
        ("b489d070-7914-48a8-bea4-ff31517400f8", "62d60e93-6198-4d54-8fb8-7e6fe9d68f23"),
        ("455ac762-7428-4656-b3ee-4d3b5a104129", "1ee34dc4-3b04-4a8b-805b-fdc94e7ed827"),
        42,
    ),
    (
        ("d85480f0-dfca-40b7-99b1-7e80dea4ae17", "e912b4bf-86a4-4ae4-9986-b4b270b7e868"),
        ("46fb7bf3-00b9-44a3-9892-40ace68933a9", "fcce96f6-250a-4578-bbe9-4499dbc080fd"),
        ("2051acef-097a-4e10-b6fe-bc0e7ecddbaf", "54fd9ad3-9716-408e-b721-69bb80962718"),
        8,
    ),
]


class Halves:
    """Two characters are a token: as dense in uuids as the published samples' tokenizer."""

    eos_token_id = None
    chat_template = None

    def tokenize(self, text: str) -> list[str]:
        return [text[place : place + 2] for place in range(0, len(text), 2)]

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": list(range(len(self.tokenize(text))))}


@pytest.fixture
def official(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    words = " ".join(f"Sentence {n} of the essay says something plain." for n in range(400))
    (tmp_path / "essays.json").write_text(json.dumps({"text": words}))
    files = [f"file:{tmp_path}/squad.json", f"file:{tmp_path}/hotpot.json"]
    data = {"compat": "ruler", "haystack": f"file:{tmp_path}/essays.json", "qa": files}
    keys = {"task_names": "all", "template": None}

    def make(task: str, index: int, length: int = 4096, **changes):
        config = make_config({**keys, "data": data, **changes}, "test")
        prompter = Prompter(Halves(), config)
        texts = load_data(config.data)
        return fit_sample(
            get_task(task), index=index, length=length, prompter=prompter, seed=42, data=texts
        )

    return make


@pytest.mark.parametrize("index", [0, 1])
def test_a_published_task_comes_out_the_same(official, index: int):
    text = official("niah_multikey_3", index).prompt.text
    first, last, asked, place = PUBLISHED[index]
    needles = re.findall(r"magic uuids for (\S+) is: (\S+)\.\n", text)
    assert len(needles) == 51
    assert (needles[0], needles[-1]) == (first, last)
    assert needles.index(asked) == place
    assert text.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will"
        " quiz you about the uuid afterwards.\nOne of the special magic uuids for "
    )
    assert text.endswith(
        f"\nWhat is the special magic uuid for {asked[0]} mentioned in the provided text? The "
        f"special magic uuid for {asked[0]} mentioned in the provided text is"
    )


# the scripts sort six million pairs of words
SLOW = [pytest.param(f"niah_{name}", marks=pytest.mark.slow) for name in ("single_1", "multikey_2")]


@pytest.mark.parametrize("task", [*SLOW, "vt", "cwe", "fwe", "qa_1"])
def test_samples_are_drawn_in_order_and_never_change(official, task: str):
    last = official(task, 2, 6000)
    assert last.fit
    assert last.prompt.text == official(task, 2, 6000).prompt.text
    first = official(task, 0, 6000)
    assert first.prompt.text != last.prompt.text
    for reference in last.sample.references:
        assert reference in last.sample.context
    budget = 0 if task == "fwe" else get_task(task).max_new_tokens
    assert last.prompt.n_tokens + budget <= 6000


def test_the_example_of_variable_tracking_is_the_same_in_all_samples(official):
    def example(index: int) -> str:
        return official("vt", index).prompt.text.split("\n\nMemorize and track", 1)[0]

    assert example(0) == example(3)
    assert "variables are assgined the value" in example(0)


def test_common_words_stand_at_the_same_places_in_all_samples(official):
    def places(index: int) -> list[int]:
        sample = official("cwe", index, 12_000).sample
        listed = sample.context.rsplit("Below is a numbered", 1)[1]
        found = re.findall(r"\d+\. (\S+)", listed)
        return [place for place, word in enumerate(found) if word in sample.references]

    assert places(0) == places(1)


def test_questions_come_in_the_order_of_the_file(official):
    assert official("qa_2", 3).sample.question == "Question: Which city for 3?"
    sample = official("qa_1", 1).sample
    assert sample.question == "Question: What says 1 of 0?"
    # repeated answers stay, as in the scripts
    assert sample.references == ("fact01", "fact01")
    with pytest.raises(BenchError, match="qa_2 has 30 questions, sample 30 does not exist"):
        official("qa_2", 30)


def test_essays_need_the_official_file_and_nltk(official):
    with pytest.raises(BenchError, match=r"'file:PaulGrahamEssays.json'"):
        official("niah_single_2", 0, data={"compat": "ruler"})
    with pytest.raises(BenchError, match=r"SQuAD's dev-v2.0.json"):
        official("qa_1", 0, data={"compat": "ruler"})
    with pytest.raises(BenchError, match="official settings only"):
        official("vt", 0, task_args={"vt": {"num_hops": 2}})
    pytest.importorskip("nltk")
    try:
        made = official("niah_multiquery", 0)
    except BenchError as error:
        pytest.skip(str(error))
    assert made.sample.context.count("special magic numbers for") == 4
