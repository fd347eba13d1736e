"""The embedded model's own tokenizer, where a run has already fetched it."""

from __future__ import annotations

import pytest

from kvdock_bench.fetch import SMOLLM2, cache_folder
from kvdock_bench.fitting import fit_sample
from kvdock_bench.prompting import Prompter
from kvdock_bench.tasks import GROUPS, get_task

FOLDER = cache_folder() / "models" / f"smollm2-135m-{SMOLLM2.sha256[:12]}"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "tokenizer.json").is_file(), reason="no benchmark has fetched the model yet"
)


@pytest.fixture(scope="module")
def own_prompter(config) -> Prompter:
    from transformers import AutoTokenizer

    return Prompter(AutoTokenizer.from_pretrained(FOLDER), config)


@pytest.mark.parametrize("length", [512, 1024, 2048])
@pytest.mark.parametrize("task", GROUPS["all"])
def test_prompts_fill_the_length(own_prompter, config, data, task: str, length: int):
    for index in range(3):
        fitted = fit_sample(
            get_task(task), index=index, length=length, prompter=own_prompter, seed=42, data=data
        )
        total = fitted.prompt.n_tokens + config.max_new_tokens(get_task(task))
        assert fitted.fit
        assert 0.99 * length <= total <= length


def test_the_prefix_follows_the_assistant_header(own_prompter, data, config):
    fitted = fit_sample(
        get_task("niah_single_2"), index=0, length=512, prompter=own_prompter, seed=42, data=data
    )
    head, turn = fitted.prompt.text.split("<|im_start|>assistant\n")
    assert turn.startswith("The special magic number for")
    assert turn.endswith(" is")
    assert head.count("<|im_start|>user\n") == 1
