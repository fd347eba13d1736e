"""One process of `two_gpus.py`: load a model where its place says and answer with every method."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from kvdock.errors import KVDockError
from kvdock.testing import Case, left_padded
from kvdock_bench.haystack import load_haystack
from kvdock_bench.loading import load_weights
from kvdock_bench.placement import Place

FULL = "full"


@dataclass(frozen=True, slots=True)
class Task:
    """What every process does.

    Args:
        folder: of the model.
        text: whether the prompts are text for the folder's tokenizer, else random tokens.
        lengths: tokens of the prompts of the one batch.
        new: tokens to generate.
    """

    folder: str
    text: bool
    lengths: tuple[int, ...]
    new: int

    @property
    def budget(self) -> int:
        """Return the slots that the two longer of three prompts do not fit in."""
        return max(self.lengths) // 2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method said, or why it did not.

    Args:
        tokens: greedy ones by row.
        margins: how far the chosen logit is above the next one, by row and step.
        broken: the process may have to be replaced before it does anything else.
    """

    method: str
    tokens: tuple[tuple[int, ...], ...] = ()
    margins: tuple[tuple[float, ...], ...] = ()
    bytes_held: int = 0
    seconds: float = 0.0
    error: str | None = None
    broken: bool = False


def serve(task: Task, dtype: str, place: Place, methods: Sequence[str], pipe: Connection) -> None:
    """Send `None` when the model is loaded, then an answer for every method; a text is the end."""
    torch.set_num_threads(1)
    try:
        model = load_weights(task.folder, dtype, place, trust_remote_code=False).eval()
        batch = prompts(task, model)
    except Exception as error:
        pipe.send(_line(error))
        return
    pipe.send(None)
    for method in methods:
        answer = _answer(model, task, method, batch)
        pipe.send(answer)
        if answer.broken:
            return
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()  # the other processes' answers are wanted too; then the pipe is closed
    if place.ranks > 1:
        torch.distributed.destroy_process_group()


def prompts(task: Task, model: Any) -> dict[str, Tensor]:
    """Return a left-padded batch on the device that takes the model's input."""
    if task.text:
        tokenizer = AutoTokenizer.from_pretrained(task.folder, trust_remote_code=False)
        words = " ".join(load_haystack("austen").take(4 * sum(task.lengths)))
        ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
        batch = _padded(ids, task.lengths)
    else:
        batch, _ = left_padded(task.lengths, vocabulary=model.config.vocab_size)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _padded(ids: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Cut prompts from int64 [N] one after the other and fill them up on their left."""
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, (length, part) in enumerate(zip(lengths, ids.split(lengths[0]), strict=False)):
        rows[row, -length:], mask[row, -length:] = part[:length], 1
    return {"input_ids": rows, "attention_mask": mask}


def _answer(model: Any, task: Task, method: str, batch: dict[str, Tensor]) -> Answer:
    begun = time.perf_counter()
    try:
        with _attached(model, task, method) as dock:
            made = model.generate(
                **batch,
                max_new_tokens=task.new,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            held = 0 if dock is None else dock.report().bytes_held
        tokens = made.sequences[:, batch["input_ids"].shape[1] :].tolist()
        best = torch.stack(made.logits, 1).float().topk(2).values
        margins = (best[..., 0] - best[..., 1]).tolist()
    except Exception as error:
        # what kvdock refuses, it refuses before anything ran, and in every process alike
        broken = not isinstance(error, KVDockError)
        if broken:
            traceback.print_exc()
        return Answer(method, error=_line(error), broken=broken)
    return Answer(
        method,
        tuple(map(tuple, tokens)),
        tuple(map(tuple, margins)),
        held,
        round(time.perf_counter() - begun, 3),
    )


def _attached(model: Any, task: Task, method: str) -> Any:
    if method == FULL:
        return contextlib.nullcontext()
    # eagerly everywhere: captured steps keep room for what comes, and a spread model has none
    return Case(method, budget=task.budget).attach(model, graph=False)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:500]
