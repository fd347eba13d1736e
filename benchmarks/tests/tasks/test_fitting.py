"""Every task fills a length without exceeding it, the same way in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from kvdock_bench.fitting import fit_sample
from kvdock_bench.tasks import GROUPS, SampleKey, get_task

ALL = GROUPS["all"]

DETERMINISM = """
import sys, hashlib
from kvdock_bench.tasks import get_tasks, SampleKey
from kvdock_bench.sources import load_data
from kvdock_bench.config import load_config
config = load_config("RULER_all")
data = load_data(config.data)
for task in config.tasks:
    low, high = task.units(1024, task.defaults, data)
    key = SampleKey(task.name, 1024, 3, 7)
    sample = task.build(min(high, low + 9), key, task.defaults, data, fill=3)
    print(task.name, hashlib.sha256(repr(sample).encode()).hexdigest())
"""


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("task", ALL)
def test_prompt_and_budget_fill_the_length(fit, config, task: str, length: int):
    for index in range(3):
        fitted = fit(task, length, index)
        total = fitted.prompt.n_tokens + config.max_new_tokens(get_task(task))
        assert fitted.fit
        assert 0.99 * length <= total <= length


@pytest.mark.parametrize("task", ALL)
def test_lengths_hold_for_other_tokenizers(foreign, config, data, task: str):
    """One reads bytes, one whole words: both fill a length as well as BPE with single digits."""
    for prompter, length in foreign:
        fitted = fit_sample(
            get_task(task), index=0, length=length, prompter=prompter, seed=42, data=data
        )
        total = fitted.prompt.n_tokens + config.max_new_tokens(get_task(task))
        assert fitted.fit
        assert 0.99 * length <= total <= length


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "fwe", "qa_1"])
def test_padding_changes_nothing_but_the_length(data, task: str):
    plain, filled = (
        get_task(task).build(
            40, SampleKey(task, 1024, 0, 42), get_task(task).defaults, data, fill=fill
        )
        for fill in (0, 30)
    )
    assert len(filled.context.split()) == len(plain.context.split()) + 30
    assert filled.references == plain.references
    assert filled.question == plain.question
    for reference in plain.references:
        assert filled.context.count(reference) == plain.context.count(reference)


@pytest.mark.parametrize("task", ALL)
def test_one_more_unit_would_not_fit(fit, prompter, data, config, task: str):
    fitted = fit(task, 1024)
    key = SampleKey(task, 1024, 0, 42)
    longer = get_task(task).build(fitted.units + 1, key, config.args_for(get_task(task)), data)
    assert len(prompter.tokens(longer)[1]) + config.max_new_tokens(get_task(task)) > 1024


@pytest.mark.parametrize("task", ALL)
def test_too_short_a_length_is_reported_and_not_cut(fit, task: str):
    fitted = fit(task, 100)
    assert not fitted.fit
    assert fitted.prompt.n_tokens > 100 - 88


def test_same_key_gives_same_prompt_and_others_differ(fit):
    for task in ALL:
        text = fit(task).prompt.text
        assert text == fit(task).prompt.text
        assert text != fit(task, index=1).prompt.text
        assert text != fit(task, seed=43).prompt.text


def test_another_process_with_another_hash_seed_gives_the_same_samples():
    def run(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", DETERMINISM], env=env, check=True, capture_output=True, text=True
        ).stdout

    first = run("1")
    assert len(first.splitlines()) == 13
    assert first == run("2")


def test_prompts_do_not_change_between_releases(data):
    """A changed prompt is a changed benchmark: raise GENERATOR and redo the committed numbers."""
    from kvdock_bench.tasks import get_tasks

    lines = []
    for task in get_tasks("all"):
        key = SampleKey(task.name, 1024, 0, 42)
        lines.append(task.build(80, key, task.defaults, data, fill=7).context)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest[:16] == "453c488544259d81"


def test_probes_are_few(fit, prompter, data, monkeypatch):
    probes = 0
    tokens = prompter.tokens

    def counted(sample):
        nonlocal probes
        probes += 1
        return tokens(sample)

    monkeypatch.setattr(prompter, "tokens", counted)
    for task in ALL:
        probes = 0
        fit_sample(get_task(task), index=5, length=4096, prompter=prompter, seed=1, data=data)
        assert probes <= 16, (task, probes)
