"""Generate one batch and measure it: time to first token, time per token, cache bytes, peak."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from kvdock.compat import CACHE
from kvdock_bench.answer import read_answer
from kvdock_bench.protocol import stop_ids
from kvdock_bench.record import MemoryUse, Timings
from kvdock_bench.shape import KVShape
from kvdock_bench.watch import FirstToken, PrefillEnd, Watch


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of a batch."""

    text: str
    n_new_tokens: int
    finish_reason: str
    timings: Timings
    memory: MemoryUse
    meta: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to generate; the same for every row of a batch.

    Args:
        likelihood: judge the tokens of the later turn instead of generating.
    """

    max_new_tokens: int
    do_sample: bool = False
    stop: tuple[str, ...] = ()
    seed: int = 0
    likelihood: bool = False


class Generator:
    """Run one loaded model; the same code measures the full cache and every method.

    Args:
        shards: processes that hold a part of every layer, and so of every cache.
    """

    def __init__(
        self, model: Any, tokenizer: Any, shape: KVShape, item_bytes: int, *, shards: int = 1
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._shape = shape
        self._item_bytes = item_bytes
        self._device: torch.device = model.device
        self._shards = shards
        found = {weight.device for weight in model.parameters()}
        self._gpus = sorted((gpu for gpu in found if gpu.type == "cuda"), key=str)

    def run(
        self,
        prompts: Sequence[list[int]],
        settings: Settings,
        dock: Any,
        *,
        tails: Sequence[int] = (),
    ) -> list[Answer]:
        """Generate for a batch of token lists.

        Args:
            dock: None for the full cache.
            tails: tokens at each prompt's end that are fed as a later turn, after the rest has been
                read and compressed; none at all, or some in every prompt.
        """
        if settings.likelihood:
            return [self._judge(*pair, dock) for pair in zip(prompts, tails, strict=True)]
        if not any(tails):
            tails = [0] * len(prompts)
        heads = [len(prompt) - tail for prompt, tail in zip(prompts, tails, strict=True)]
        ids, mask = self._pad_left(prompts, tails)
        extra: dict[str, Any] = {}
        cache = None
        if dock is None:
            cache = extra[CACHE] = DynamicCache(config=self.model.config)
        if settings.stop:
            extra |= {"stop_strings": list(settings.stop), "tokenizer": self.tokenizer}
        torch.manual_seed(settings.seed)
        self._reset_peak()
        watch = Watch(self._gpus, lambda: 0 if cache is None else cache_bytes(cache))
        held = None
        if any(tails):
            width = ids.shape[1] - max(tails)
            if dock is not None:
                extra[CACHE] = dock.new_cache()
            self._read(ids[:, :width], mask[:, :width], extra[CACHE])
            # what the question adds is not compressed and is not counted
            held = watch.held_bytes() if dock is None else dock.report().bytes_held
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._config(settings),
            logits_processor=LogitsProcessorList([PrefillEnd(watch)]),
            stopping_criteria=StoppingCriteriaList([FirstToken(watch)]),
            **extra,
        )
        timings = watch.timings(len(prompts))
        peak = self._peak()
        if held is None:
            held = watch.held if dock is None else dock.report().bytes_after_prefill
        held *= self._shards
        return [
            self._answer(row, head, settings, timings, peak, held / len(prompts))
            for row, head in zip(output[:, ids.shape[1] :].tolist(), heads, strict=True)
        ]

    @torch.inference_mode()
    def _read(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> None:
        """Feed a context and let the method compress it."""
        self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=1,
        )

    @torch.inference_mode()
    def _judge(self, prompt: list[int], tail: int, dock: Any) -> Answer:
        """Feed a context, then the text after it, and judge the latter's tokens but the first.

        The first token's probability comes from the context's own forward, which no method that
        acts at its end can change.
        """
        ids, mask = self._pad_left([prompt], [tail])
        width = len(prompt) - tail
        cache = DynamicCache(config=self.model.config) if dock is None else dock.new_cache()
        self._reset_peak()
        watch = Watch(self._gpus, lambda: 0)
        self._read(ids[:, :width], mask[:, :width], cache)
        watch.prefill_end = watch.first_token = watch.now()
        held = cache_bytes(cache) if dock is None else dock.report().bytes_held
        held *= self._shards
        logits = self.model(
            input_ids=ids[:, width:-1], attention_mask=mask[:, :-1], **{CACHE: cache}
        ).logits[0]
        timings = watch.timings(1)
        wanted, chosen = ids[0, width + 1 :], logits.argmax(-1)
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
        if not torch.isfinite(loss):
            # JSON has no such number, and no mean would survive it
            raise ArithmeticError(f"the scores of the model give a likelihood of {loss.item()}")
        full = self._shape.full_bytes(width, self._item_bytes)
        return Answer(
            text=self.tokenizer.decode(chosen.tolist(), skip_special_tokens=True),
            n_new_tokens=len(wanted),
            finish_reason="judged",
            timings=timings,
            memory=MemoryUse(self._peak(), round(held), full, held / full if full else 1.0),
            meta={
                "nll": loss.item(),
                "ranked_first": (chosen == wanted).float().mean().item(),
            },
        )

    def _answer(
        self,
        row: list[int],
        n_prompt: int,
        settings: Settings,
        timings: Timings,
        peak: int | None,
        held: float,
    ) -> Answer:
        text, count, reason = read_answer(self.tokenizer, row, self._end_tokens(), settings.stop)
        full = self._shape.full_bytes(n_prompt, self._item_bytes)
        return Answer(
            text=text,
            n_new_tokens=count,
            finish_reason=reason,
            timings=timings,
            memory=MemoryUse(peak, round(held), full, held / full if full else 1.0),
        )

    def _config(self, settings: Settings) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample = settings.do_sample
        if not settings.do_sample:
            # a model's own sampling settings only cause warnings when decoding is greedy
            config.temperature = config.top_p = config.top_k = None
        config.num_beams = 1
        config.max_length = None
        config.max_new_tokens = settings.max_new_tokens
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def _end_tokens(self) -> set[int]:
        return set(stop_ids(self.model))

    def _pad_left(
        self, prompts: Sequence[list[int]], tails: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and validity, heads and tails each padded on their left."""
        cuts = [len(prompt) - tail for prompt, tail in zip(prompts, tails, strict=True)]
        parts = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
        rests = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        fill = self.tokenizer.pad_token_id or 0
        ids, mask = [], []
        widths = max(map(len, parts)), max(map(len, rests))
        for row in zip(parts, rests, strict=True):
            lacking = [width - len(part) for width, part in zip(widths, row, strict=True)]
            ids.append([fill] * lacking[0] + row[0] + [fill] * lacking[1] + row[1])
            mask.append([0] * lacking[0] + [1] * len(row[0]) + [0] * lacking[1] + [1] * len(row[1]))
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _reset_peak(self) -> None:
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def _peak(self) -> int | None:
        if not self._gpus:
            return None
        # every process of a split model allocates about the same
        return self._shards * sum(map(torch.cuda.max_memory_allocated, self._gpus))


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes allocated for a plain cache's keys and values, views counted whole, once."""
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
