"""What each of the thirteen tasks promises about its samples."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from statistics import mean

import pytest

from kvdock_bench.errors import BenchError
from kvdock_bench.tasks import GROUPS, get_task, get_tasks

NIAH = [name for name in GROUPS["all"] if name.startswith("niah_")]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
REFERENCES = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
DISTRACTORS = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


@pytest.mark.parametrize("task", GROUPS["all"])
def test_references_are_in_the_context_and_never_in_the_question(fit, task: str):
    for index in range(5):
        sample = fit(task, 1024, index).sample
        assert sample.index == index
        assert len(set(sample.references)) == REFERENCES.get(task, 1)
        for reference in sample.references:
            assert reference in sample.context
            asked = f"{sample.question}{sample.answer_prefix}".lower()
            assert not re.search(rf"\b{re.escape(reference.lower())}\b", asked)


@pytest.mark.parametrize("task", NIAH)
def test_every_needle_is_there_exactly_once(fit, task: str):
    for index in range(5):
        sample = fit(task, 1024, index).sample
        needles = NEEDLE.findall(sample.context)
        values = [value for _, _, value in needles]
        assert len(values) == len(set(values))
        asked = [value for _, key, value in needles if key in sample.meta["keys"]]
        assert sorted(asked) == sorted(sample.references)
        for value in sample.references:
            assert sample.context.count(value) == 1
        for key in sample.meta["keys"]:
            assert key in sample.question
        if task not in ("niah_multikey_2", "niah_multikey_3"):
            assert len(needles) == DISTRACTORS.get(task, 1)
        else:
            assert len(needles) > 5


def test_values_have_their_kind(fit):
    assert re.fullmatch(r"[1-9]\d{6}", fit("niah_single_1").sample.references[0])
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, fit("niah_single_3").sample.references[0])
    sample = fit("niah_multikey_3").sample
    assert re.fullmatch(uuid, sample.references[0])
    assert re.fullmatch(uuid, sample.meta["keys"][0])


def test_one_answer_is_asked_in_the_singular_and_several_in_the_plural(fit):
    one = fit("niah_single_2").sample
    assert one.question.startswith("What is the special magic number for")
    assert one.answer_prefix.endswith("mentioned in the provided text is")
    several = fit("niah_multiquery").sample
    assert several.question.startswith("What are all the special magic numbers for")
    assert ", and " in several.question
    assert several.answer_prefix.endswith("mentioned in the provided text are")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "qa_1"])
def test_depths_spread_over_the_whole_haystack(fit, task: str):
    found = []
    for index in range(60):
        sample = fit(task, 1024, index).sample
        clue = sample.references[0]
        found.append(sample.context.index(clue) / len(sample.context))
    assert 0.35 < mean(found) < 0.65
    thirds = Counter(min(2, int(3 * depth)) for depth in found)
    # 60 uniform draws leave fewer than 8 in a third with probability 1e-4
    assert min(thirds[third] for third in range(3)) >= 8, thirds


def test_multivalue_depths_are_recorded_in_order(fit):
    depths = fit("niah_multivalue").sample.meta["depths"]
    assert len(depths) == 4
    assert depths == sorted(depths)


def test_variables_form_one_chain_in_order(fit):
    sample = fit("vt").sample
    main = sample.context.rsplit("Memorize and track", 1)[1]
    value = re.search(r"value (\d{5}) in", sample.question)[1]
    statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", main)
    assert [name for name, _ in statements] == list(sample.references)
    assert [source for _, source in statements] == [value, *sample.references[:-1]]
    example = sample.context.rsplit("Memorize and track", 1)[0]
    assert len(set(re.findall(r"VAR ([A-Z]{3}) =", example))) == 5
    assert not any(name in example for name in sample.references)


def test_more_chains_give_distractors_and_hops_give_references(fit):
    sample = fit("vt", num_chains=3, num_hops=2, one_shot=False).sample
    assert len(sample.references) == 3
    assert len(re.findall(r"VAR [A-Z]{5} =", sample.context)) == 9
    assert "Answer" not in sample.context


@pytest.mark.parametrize(("length", "often", "seldom"), [(512, 4, 1), (1024, 6, 1), (4096, 30, 3)])
def test_common_words_have_their_counts(fit, length: int, often: int, seldom: int):
    sample = fit("cwe", length).sample
    assert (sample.context.count("Below is a numbered list") == 2) == (length >= 1024)
    listed = sample.context.rsplit("Below is a numbered list", 1)[1]
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = Counter(words)
    assert {counts[word] for word in sample.references} == {often}
    assert {n for word, n in counts.items() if word not in sample.references} == {seldom}
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", listed)]
    assert numbers == list(range(1, len(words) + 1))


def test_common_words_lie_at_other_places_in_each_sample(fit):
    def places(index: int) -> list[int]:
        sample = fit("cwe", 512, index).sample
        words = re.findall(r"\d+\. (\S+)", sample.context)
        return [place for place, word in enumerate(words) if word in sample.references]

    assert places(0) != places(1)


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_frequent_words_decrease_strictly_by_rank(fit, length: int):
    for index in range(5):
        sample = fit("fwe", length, index).sample
        text = sample.context.split("coded words. ", 1)[1]
        ranked = Counter(text.split()).most_common(5)
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == sample.references
        counts = [n for _, n in ranked]
        assert all(a > b for a, b in pairwise(counts)), counts


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_the_answer_is_in_one_document_only(fit, task: str):
    for index in range(10):
        sample = fit(task, 1024, index).sample
        documents = re.split(r"\n*Document \d+:\n", sample.context)[1:]
        assert sample.meta["documents"] == len(documents) > 5
        assert sum(sample.references[0] in text for text in documents) == 1
        asked = re.search(r"(?:was|of|that) ([A-Z]\w+ [A-Z]\w+)", sample.question)[1]
        assert sum(asked in text for text in documents) == 1


def test_two_hops_need_two_documents(fit):
    sample = fit("qa_2").sample
    person = re.search(r"that (\w+ \w+) works", sample.question)[1]
    company = re.search(rf"{person} works for the company ([\w ]+)\.", sample.context)[1]
    pattern = rf"head office of {company} is in the city of (\w+)"
    assert re.search(pattern, sample.context)[1] == sample.references[0]
    assert company not in sample.question


def test_groups_and_names():
    assert len(get_tasks("all")) == 13
    assert [task.name for task in get_tasks(["light"])] == list(GROUPS["light"])
    assert len(GROUPS["light"]) == 6
    assert [task.name for task in get_tasks(["vt", "niah_single_1", "vt"])] == [
        "niah_single_1",
        "vt",
    ]
    official = {task.name: task.max_new_tokens for task in get_tasks("all")}
    assert {official[name] for name in NIAH} == {128}
    assert [official[name] for name in ("vt", "cwe", "fwe", "qa_1")] == [30, 120, 50, 32]
    metrics = {task.metric for task in get_tasks("qa")}
    assert metrics == {"string_match_part"}


@pytest.mark.parametrize("name", ["niah_singel_1", "../vt", "vt/../../x", "VT ", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str):
    with pytest.raises(BenchError, match="niah_single_1"):
        get_tasks([name])
    with pytest.raises(BenchError, match="Unknown task"):
        get_task(name)


def test_substitutes_are_labelled(data):
    labels = {task.name: task.data_source(data) for task in get_tasks("all")}
    assert labels["niah_single_1"] == "as RULER: generated"
    assert labels["niah_single_2"].startswith("offline substitute: Austen")
    assert labels["qa_1"].startswith("offline substitute: synthetic one-hop")
    described = data.describe(get_tasks("all"))
    assert described["tasks"] == labels
    assert set(described["sha256"]) == {"haystack", "qa_1", "qa_2"}
