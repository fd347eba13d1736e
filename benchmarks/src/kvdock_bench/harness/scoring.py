"""Score continuations of contexts that lie compressed in a cache.

B rows, T columns, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvdock.compat import CACHE


@dataclass(frozen=True, slots=True)
class Request:
    """A context and its continuation, at least one token each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return what is compressed: all but the last token, if there is another."""
        return self.context[:-1] or self.context

    @property
    def fed(self) -> tuple[int, ...]:
        """Return the tokens of the steps after the prompt; the last token of all predicts nothing.

        The context's last token is one of them, so that already the first token of a continuation
        is predicted from the compressed cache.
        """
        held_back = self.context[-1:] if len(self.context) > 1 else ()
        return held_back + self.continuation[:-1]


def make_batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Return places of requests in batches, those with one prompt together, long ones first."""
    order = sorted(
        range(len(requests)), key=lambda i: (-len(requests[i].prompt), requests[i].prompt, i)
    )
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def score(model: Any, dock: Any, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood and whether greedy decoding would give it.

    Every prompt goes through the model once, is compressed, and is copied for each of its
    continuations; these follow token by token, as they would be generated.
    """
    total = [0.0] * len(requests)
    greedy = [True] * len(requests)
    for step, scores in enumerate(_steps(model, dock, requests)):
        for row, request in enumerate(requests):
            # without a token held back, the prompt's own scores are those of the first
            place = step if len(request.context) == 1 else step - 1
            if 0 <= place < len(request.continuation):
                target = request.continuation[place]
                total[row] += float(scores[row, target])
                greedy[row] &= int(scores[row].argmax()) == target
    return list(zip(total, greedy, strict=True))


def _steps(model: Any, dock: Any, requests: Sequence[Request]) -> Iterator[Tensor]:
    """Yield the log-probabilities [B, V] after the prompt and after each token that follows."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    ids, mask = _pad_left(prompts, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = dock.new_cache()
    given = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **given).logits
    rows = torch.tensor([prompts.index(request.prompt) for request in requests]).to(model.device)
    if len(prompts) < len(requests):
        cache.batch_select_indices(rows)
    yield _log_probabilities(logits)[rows]
    mask, position = mask[rows], positions[rows, -1:]
    for step in range(max(len(request.fed) for request in requests)):
        # rows that have ended repeat their last token, and nobody looks at them
        tokens = [(request.fed or request.context)[-1:] for request in requests]
        tokens = [r.fed[step : step + 1] or t for r, t in zip(requests, tokens, strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=-1)
        position = position + 1
        logits = model(
            input_ids=torch.tensor(tokens, device=model.device),
            attention_mask=mask,
            position_ids=position,
            **given,
        ).logits
        yield _log_probabilities(logits)


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits[:, -1].float(), dim=-1)


def _pad_left(prompts: Sequence[tuple[int, ...]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
