"""Texts come from the package or from the user's files, and broken files are named."""

from __future__ import annotations

import json

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.fitting import fit_sample
from kvdock_bench.haystack import Haystack, load_haystack, split_sentences
from kvdock_bench.prompting import Prompter
from kvdock_bench.schema import DataSources
from kvdock_bench.sources import load_data
from kvdock_bench.tasks import get_task
from kvdock_bench.words import vocabulary, word_list

SQUAD = {
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a} says fact{a}{p} plainly.",
                    "qas": [
                        {
                            "question": f"What says {p} of {a}?",
                            "answers": [{"text": f"fact{a}{p}"}, {"text": f"fact{a}{p}"}],
                            "is_impossible": False,
                        },
                        {"question": "Impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(6)
            ],
        }
        for a in range(6)
    ]
}
HOTPOT = [
    {
        "question": f"Which city for {n}?",
        "answer": f"City{n}",
        "supporting_facts": [["A", 0], ["B", 0]],
        "context": [
            ["A", [f"A{n} is B{n}."]],
            ["B", [f"B{n} ", f"in City{n}."]],
            ["C", [f"C{n}."]],
        ],
    }
    for n in range(30)
]


def test_the_shipped_text_is_the_novel():
    haystack = load_haystack("austen")
    assert haystack.n_words == 121_567
    sentences = haystack.take(60)
    assert sum(len(sentence.split()) for sentence in sentences) == 60
    assert any(s.startswith("PRIDE AND PREJUDICE") for s in sentences)
    assert haystack is not load_haystack("austen")
    assert haystack.sha256 == load_haystack("austen").sha256


@pytest.mark.parametrize("n_words", [0, 1, 99, 100, 101, 250, 1000])
def test_a_short_haystack_starts_over(n_words: int):
    words = [f"w{n}{'.' if n % 7 == 0 else ''}" for n in range(100)]
    haystack = Haystack(" ".join(words), "test")
    taken = " ".join(haystack.take(n_words)).split()
    assert taken == (words * 11)[:n_words]


def test_sentences_do_not_end_at_titles_or_before_small_letters():
    text = 'Mr. Bennet came. "Is it so?" cried she. He said "No!" and left. _You_ know.'
    joined = [" ".join(sentence) for sentence in split_sentences(text.split())]
    assert joined == [
        "Mr. Bennet came.",
        '"Is it so?" cried she.',
        'He said "No!" and left.',
        "_You_ know.",
    ]


def test_word_lists_are_plain_and_sorted():
    for kind in ("noun", "adjective", "verb"):
        words = word_list(kind)
        assert len(words) > 800
        assert list(words) == sorted(set(words))
    assert all(word.isalpha() and word.islower() for word in vocabulary())


def test_user_files_replace_the_substitutes(tmp_path, tokenizer, config):
    squad, hotpot, book = (tmp_path / name for name in ("s.json", "h.json", "book.txt"))
    squad.write_text(json.dumps(SQUAD), encoding="utf-8")
    hotpot.write_text(json.dumps(HOTPOT), encoding="utf-8")
    book.write_text("Once upon a time there was a book. " * 40, encoding="utf-8")
    sources = DataSources(haystack=f"file:{book}", qa=[f"file:{squad}", f"file:{hotpot}"])
    data = load_data(sources)
    assert get_task("qa_1").data_source(data) == "user file: s.json (SQuAD layout)"
    assert get_task("qa_2").data_source(data) == "user file: h.json (HotpotQA layout)"
    assert get_task("niah_single_2").data_source(data) == "user file: book.txt"
    prompter = Prompter(tokenizer, config)
    asked = set()
    for index in range(12):
        for name in ("qa_1", "qa_2"):
            fitted = fit_sample(
                get_task(name), index=index, length=512, prompter=prompter, seed=1, data=data
            )
            sample = fitted.sample
            assert fitted.fit
            assert sample.references[0] in sample.context
            assert "Impossible" not in sample.question
            asked.add(sample.question)
    assert len(asked) == 24
    long = fit_sample(
        get_task("niah_single_2"), index=0, length=2048, prompter=prompter, seed=1, data=data
    )
    assert long.prompt.n_tokens > 1900


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "as json"),
        ("[]", "no question in a known layout"),
        ("{}", "no question in a known layout"),
        ("3", "no question in a known layout"),
        ('{"data": 3}', "no question in a known layout"),
        ('[{"question": "a"}]', "no question in a known layout"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}', "no question"),
    ],
)
def test_broken_question_files_are_named(tmp_path, content: str, message: str):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    data = load_data(DataSources(qa=f"file:{path}"))
    with pytest.raises(BenchError, match=message) as error:
        data.qa(1)
    assert "broken.json" in str(error.value)


def test_broken_haystacks_are_named(tmp_path):
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 50)
    for name, message in (
        ("short.txt", "at least 100"),
        ("binary.txt", "UTF-8"),
        ("absent.txt", "absent"),
    ):
        with pytest.raises(BenchError, match=message):
            load_haystack(f"file:{tmp_path / name}")
