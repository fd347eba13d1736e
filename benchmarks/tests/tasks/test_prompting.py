"""Prompts carry the answer prefix where the config says, and special tokens once."""

from __future__ import annotations

import pytest

from kvdock_bench.config import load_config, override
from kvdock_bench.errors import BenchError
from kvdock_bench.prompting import Prompter
from kvdock_bench.tasks import Sample

SAMPLE = Sample("vt", 0, "The haystack.", "The question?", " Answer: it is", ("x",))


def render(tokenizer, **changes):
    return Prompter(tokenizer, override(load_config("demo"), **changes)).render(SAMPLE)


def test_chat_with_the_prefix_after_the_header(tokenizer):
    prompt = render(tokenizer)
    assert prompt.text == (
        "<s><|user|>The haystack.\nThe question?<|end|><|assistant|>Answer: it is"
    )
    assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.n_tokens == len(prompt.input_ids)
    assert tokenizer.decode(prompt.input_ids) == prompt.text


def test_prefix_in_the_user_turn_or_left_out(tokenizer):
    inside = render(tokenizer, answer_prefix="in_user").text
    assert inside.endswith("The question? Answer: it is<|end|><|assistant|>")
    assert "Answer" not in render(tokenizer, answer_prefix="none").text


@pytest.mark.parametrize("change", [{"template": None}, {"no_template_tasks": "vt"}])
def test_raw_text_has_one_bos_and_no_roles(tokenizer, change):
    prompt = render(tokenizer, **change)
    assert prompt.text == "The haystack.\nThe question? Answer: it is"
    assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.input_ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_closes_every_text_is_reopened(tokenizer):
    class Closing:
        chat_template = None
        eos_token_id = 9

        def __call__(self, text: str):
            return {"input_ids": [1, 2, 9]}

    assert render(Closing(), template=None).input_ids == [1, 2]


def test_a_model_without_template_gets_raw_text(tokenizer):
    class Plain:
        chat_template = None
        eos_token_id = None

        def __call__(self, text: str, **options):
            return tokenizer(text, **options)

    prompter = Prompter(Plain(), load_config("demo"))
    assert prompter.template_id == "raw"
    assert prompter.render(SAMPLE).text.startswith("The haystack.")


def test_template_file_and_its_identity(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("USER {{ messages[0]['content'] }} BOT", encoding="utf-8")
    config = override(load_config("demo"), template=str(path))
    prompter = Prompter(tokenizer, config)
    assert prompter.render(SAMPLE).text.endswith("The question? BOTAnswer: it is")
    assert prompter.template_id != Prompter(tokenizer, load_config("demo")).template_id
    with pytest.raises(BenchError, match="template: cannot read"):
        render(tokenizer, template=str(tmp_path / "absent.jinja"))


def test_a_broken_template_is_named(tokenizer, tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(BenchError, match=r"broken\.jinja"):
        render(tokenizer, template=str(path))


def test_max_length_cuts_the_middle(tokenizer):
    whole = render(tokenizer)
    cut = render(tokenizer, max_length=11)
    assert cut.n_tokens == 11
    assert cut.input_ids == whole.input_ids[:5] + whole.input_ids[-6:]
    assert render(tokenizer, max_length=whole.n_tokens).text == whole.text
