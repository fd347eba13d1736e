"""Turn a sample into the text and tokens that the model reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from kvdock_bench.errors import BenchError
from kvdock_bench.official_fit import OfficialFits

if TYPE_CHECKING:
    from kvdock_bench.schema import BenchConfig
    from kvdock_bench.tasks import Sample


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: the text, its tokens, and their number.

    Args:
        n_tail: tokens at the end that are fed as a later turn, after the rest is compressed.
    """

    text: str
    input_ids: list[int]
    n_tokens: int
    n_tail: int = 0


class Prompter:
    """Apply the chat template, the answer prefix and the length cap of one config."""

    def __init__(self, tokenizer: Any, config: BenchConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._template = _load_template(tokenizer, config.template)
        self._cut_first = config.suite.cut_first
        self.official = OfficialFits()

    @property
    def template_id(self) -> str:
        """Name the template: "raw", or "chat:" and the start of its hash."""
        if self._template is None:
            return "raw"
        return f"chat:{hashlib.sha256(self._template.encode()).hexdigest()[:12]}"

    def tokens(self, sample: Sample) -> tuple[str, list[int], int]:
        """Return the whole prompt's text and tokens, and how many of them are a later turn's."""
        text, raw = self._text(sample)
        if not sample.likelihood and self.config.question == "aware":
            return text, self._encode(text, raw), 0
        # The turns are encoded apart, as they reach the model.
        at = text.rfind(sample.question.strip()) if sample.question.strip() else -1
        if at <= 0:
            raise BenchError(
                f"{sample.task}, sample {sample.index}: the prompt has no question after its "
                "context, so the question cannot be a turn of its own. Use question: aware, or a "
                "longer max_length where that has cut it."
            )
        head = self._encode(text[:at], raw)
        tail = list(self.tokenizer(text[at:], add_special_tokens=False)["input_ids"])
        return text, head + tail, len(tail)

    def text(self, sample: Sample) -> str:
        """Return the whole prompt's text, before any cut."""
        return self._text(sample)[0]

    def render(self, sample: Sample) -> Prompt:
        """Return the prompt, its middle cut out where it exceeds max_length."""
        text, ids, n_tail = self.tokens(sample)
        cap = self.config.max_length
        if cap is not None and not self._cut_first and len(ids) > cap:
            ids = _without_middle(ids, cap)
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            n_tail = min(n_tail, cap - cap // 2)
        return Prompt(text, ids, len(ids), n_tail)

    def _text(self, sample: Sample) -> tuple[str, bool]:
        """Return the whole text, and whether it is raw, without a chat template."""
        joint = sample.joint if sample.context and sample.question else ""
        body = f"{sample.context}{joint}{sample.question}"
        cap = self.config.max_length
        if self._cut_first and cap is not None:
            ids = self.tokenizer(body, add_special_tokens=False)["input_ids"]
            if len(ids) > cap:
                half, decode = cap // 2, self.tokenizer.decode
                body = decode(ids[:half], skip_special_tokens=True)
                body += decode(ids[len(ids) - half :], skip_special_tokens=True)
        prefix = sample.answer_prefix if self.config.answer_prefix != "none" else ""
        if self._template is None or sample.task in self.config.no_template_tasks:
            return body + prefix, True
        inside = self.config.answer_prefix == "in_user"
        text = self._apply_template(body + prefix if inside else body)
        # The assistant's turn starts here: a leading space would be an odd first token.
        return text if inside else text + prefix.lstrip(), False

    def _encode(self, text: str, raw: bool) -> list[int]:
        if raw:
            return self._encode_raw(text)
        # The template already wrote the special tokens; adding them again would double the BOS.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _apply_template(self, user: str) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": user}],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                # Read by templates of thinking models only: the answer starts at once.
                enable_thinking=False,
            )
        except TemplateError as err:
            raise BenchError(
                f"template: {self.config.template!r} cannot render a user turn ({err})."
            ) from err
        return text

    def _encode_raw(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        # Some tokenizers close every text; the model must continue this one.
        return ids[:-1] if ids and eos is not None and ids[-1] == eos else ids


def _without_middle(ids: list[int], cap: int) -> list[int]:
    head = cap // 2
    return ids[:head] + ids[len(ids) - (cap - head) :]


def _load_template(tokenizer: Any, choice: str | None) -> str | None:
    if choice is None:
        return None
    if choice != "auto":
        try:
            return Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise BenchError(
                f"template: cannot read {choice!r} ({err}). "
                "Write 'auto', null, or the path of a .jinja file."
            ) from err
    template = getattr(tokenizer, "chat_template", None)
    # Base models carry no template: they get the plain text, and template_id says "raw".
    return template.get("default") if isinstance(template, dict) else template
