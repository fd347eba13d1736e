"""Questions asked after compression, and texts judged after it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvdock
from kvdock_bench.generate import Generator, Settings
from kvdock_bench.record import Record
from kvdock_bench.session import bench
from kvdock_bench.shape import kv_shape

SETTINGS = Settings(max_new_tokens=6)
TURN = 5


@pytest.fixture(scope="module")
def generator(model_folder) -> Generator:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    return Generator(model, tokenizer, kv_shape(model.config), 4)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(5, 500, (count,)).tolist() for count in (90, 70)]


def texts(answers) -> list[str]:
    return [answer.text for answer in answers]


def test_a_later_turn_changes_nothing_for_the_full_cache(generator, prompts):
    whole = [generator.run([prompt], SETTINGS, None)[0] for prompt in prompts]
    alone = [generator.run([prompt], SETTINGS, None, tails=[TURN])[0] for prompt in prompts]
    assert texts(alone) == texts(whole)
    # pads before the contexts and, with tails of unlike lengths, in the middle
    together = generator.run(prompts, SETTINGS, None, tails=[TURN, TURN + 4])
    assert texts(together) == texts(whole)
    # the cache is measured before the question
    assert alone[0].memory.kv_bytes == alone[0].memory.kv_full_bytes
    assert alone[0].memory.kv_full_bytes * 90 == whole[0].memory.kv_full_bytes * 85


def test_a_method_compresses_the_context_and_never_sees_the_question(generator, prompts):
    changed = [*prompts[0][:-TURN], *prompts[1][-TURN:]]
    with kvdock.attach(generator.model, "snapkv", budget=40, window=8) as dock:
        kept = []
        for prompt in (prompts[0], changed):
            answer = generator.run([prompt], SETTINGS, dock, tails=[TURN])[0]
            kept.append(dock.kept_positions(0)[..., :40])
            assert answer.memory.kv_bytes * 85 == answer.memory.kv_full_bytes * 40
        assert torch.equal(*kept)
        alone = [generator.run([prompt], SETTINGS, dock, tails=[TURN])[0] for prompt in prompts]
        together = generator.run(prompts, SETTINGS, dock, tails=[TURN, TURN])
    assert texts(together) == texts(alone)


def test_a_judged_text_has_the_likelihood_of_one_plain_forward(generator, prompts):
    (answer,) = generator.run([prompts[0]], replace(SETTINGS, likelihood=True), None, tails=[20])
    ids = torch.tensor([prompts[0]])
    with torch.inference_mode():
        logits = generator.model(ids).logits[0, -20:-1]
    wanted = ids[0, -19:]
    assert answer.n_new_tokens == 19
    expected = torch.nn.functional.cross_entropy(logits, wanted).item()
    assert answer.meta["nll"] == pytest.approx(expected, rel=1e-5)
    first = (logits.argmax(-1) == wanted).float().mean().item()
    assert answer.meta["ranked_first"] == pytest.approx(first)


def test_a_model_without_probabilities_is_an_error_in_the_records(
    arguments, tmp_path, model_folder
):
    """NaN can be neither stored nor averaged, and one bad cell must not end the run."""
    spoiled = shutil.copytree(model_folder, tmp_path / "spoiled")
    model = AutoModelForCausalLM.from_pretrained(spoiled)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(spoiled)
    config = tmp_path / "judge.yaml"
    config.write_text(
        "benchmark_name: perplexity\nlength: [256]\nnum_samples: 1\n"
        "task_args: {perplexity: {words: 20}, next_token: {words: 20}}\n"
    )
    assert bench(replace(arguments, model_path=str(spoiled), cfg_path=str(config))) == 1
    found = records(arguments)
    assert found and all(record.score is None for record in found)
    assert all("give a likelihood of nan" in record.error for record in found)


def records(arguments) -> list[Record]:
    files = (arguments.output_dir / "run" / "pred").glob("*/*.jsonl")
    return [Record.from_line(line) for path in files for line in path.read_bytes().splitlines()]


def test_a_run_asks_after_compression(arguments, tmp_path):
    config = tmp_path / "agnostic.yaml"
    config.write_text(
        "task_names: [niah_single_1]\nlength: 640\nnum_samples: 2\nquestion: agnostic\n"
        "generation: {max_new_tokens: 6}\n"
    )
    given = replace(arguments, cfg_path=str(config), acceleration=("SnapKV",), budget=("64",))
    assert bench(given) == 0
    found = records(arguments)
    assert len(found) == 4
    assert {record.protocol["question"] for record in found} == {"agnostic"}
    small = [record for record in found if record.method == "SnapKV"]
    assert all(record.memory.kv_bytes < record.memory.kv_full_bytes / 4 for record in small)


def test_a_run_judges_texts_and_its_score_is_one_over_perplexity(arguments, tmp_path):
    config = tmp_path / "text.yaml"
    config.write_text(
        "benchmark_name: perplexity\nlength: [256, 512]\nnum_samples: 2\n"
        "task_args: {perplexity: {words: 20}, next_token: {words: 20}}\n"
    )
    given = replace(arguments, cfg_path=str(config), acceleration=("SnapKV",), budget=("64",))
    assert bench(given) == 0
    found = records(arguments)
    assert len(found) == 16
    for record in found:
        name = "nll" if record.task == "perplexity" else "ranked_first"
        value = record.meta[name]
        assert record.score == (math.exp(-value) if name == "nll" else value)
        assert record.finish_reason == "judged"
    # the same words are judged at both lengths
    judged = {(record.task, record.length, record.index): record for record in found}
    for index in range(2):
        short, long = (judged["perplexity", length, index] for length in (256, 512))
        assert short.references == long.references
        assert short.n_new_tokens == long.n_new_tokens
