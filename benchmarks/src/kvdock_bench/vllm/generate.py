"""Generate with vLLM what `Generator` generates with transformers: same prompts, same ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvdock_bench.answer import read_answer
from kvdock_bench.errors import BenchError
from kvdock_bench.generate import Answer, Settings
from kvdock_bench.protocol import stop_ids
from kvdock_bench.record import MemoryUse, Timings
from kvdock_bench.shape import KVShape
from kvdock_bench.vllm.process import Worker

_UNSHARED = (
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
)


class VLLMGenerator:
    """Ask a started worker; takes the place of `Generator` in the run loop.

    Args:
        ready: what the worker said of itself when it had started.
        model: anything with the model's `generation_config`.
    """

    def __init__(
        self,
        worker: Worker,
        ready: dict[str, Any],
        *,
        model: Any,
        tokenizer: Any,
        shape: KVShape,
        item_bytes: int,
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._shape = shape
        self._item_bytes = item_bytes
        self._ends = stop_ids(model)
        self._penalty = float(getattr(model.generation_config, "repetition_penalty", None) or 1.0)
        self._longest = int(ready["max_model_len"])
        self._block = int(ready["block_size"])

    def run(
        self,
        prompts: Sequence[list[int]],
        settings: Settings,
        dock: Any,
        *,
        tails: Sequence[int] = (),
    ) -> list[Answer]:
        """Generate for a batch of token lists; a prompt that would have to be cut is refused.

        Args:
            tails: of no account: nothing is compressed, so a later turn is the prompt's end.
        """
        if settings.likelihood:
            raise BenchError("vLLM judges no texts here. Run this benchmark on transformers.")
        for prompt in prompts:
            check_fits(len(prompt), settings.max_new_tokens, self._longest)
        rows, seconds = self._worker.generate(
            prompts=[list(prompt) for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            stop=list(settings.stop),
            stop_ids=self._ends,
            repetition_penalty=self._penalty,
        )
        share = seconds / len(prompts)
        return [self._answer(*pair, settings, share) for pair in zip(prompts, rows, strict=True)]

    def _answer(
        self, prompt: list[int], row: dict[str, Any], settings: Settings, share: float
    ) -> Answer:
        if row["prompt_tokens"] != len(prompt):
            raise BenchError(
                f"vLLM read {row['prompt_tokens']} tokens of a prompt of {len(prompt)}: its answer "
                "would not compare."
            )
        steps = len(row["tokens"]) - 1
        read = read_answer(self._tokenizer, row["tokens"], set(self._ends), settings.stop)
        # memory is given out in whole blocks
        held = math.ceil(len(prompt) / self._block) * self._block
        full = self._shape.full_bytes(len(prompt), self._item_bytes)
        bytes_ = self._shape.full_bytes(held, self._item_bytes)
        return Answer(
            *read,
            timings=Timings(
                prefill_s=row["prefill_s"],
                ttft_s=row["ttft_s"],
                decode_s=row["decode_s"],
                tpot_s=row["decode_s"] / steps if steps > 0 else None,
                generate_s=share,
            ),
            # the engine takes its whole pool at once, so its peak says nothing of a prompt
            memory=MemoryUse(None, bytes_, full, bytes_ / full if full else 1.0),
        )


def check_fits(prompt: int, new: int, longest: int) -> None:
    """Refuse a prompt that leaves no room for its answer."""
    if prompt + new > longest:
        raise BenchError(
            f"A prompt of {prompt} tokens and its answer of up to {new} exceed vLLM's "
            f"max_model_len {longest}, and nothing is cut silently. Raise --max_model_len (it may "
            "not exceed the model's), run shorter lengths, or cut prompts with --max_length."
        )


def check_settings(generation_config: Any, *, do_sample: bool) -> None:
    """Refuse what the two servers would do differently."""
    if do_sample:
        raise BenchError(
            "generation.do_sample: --server vllm is greedy only; samples drawn by another "
            "generator do not compare."
        )
    for name in _UNSHARED:
        value = getattr(generation_config, name, None)
        if value:
            raise BenchError(
                f"The model's generation config sets {name}={value!r}, which --server vllm does "
                "not apply: its answers would not compare."
            )
