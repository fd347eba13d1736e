"""Find the largest haystack whose prompt and answer fit the nominal length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kvdock_bench.prompting import Prompt, Prompter
from kvdock_bench.tasks import OWN_LENGTH, Args, Sample, SampleKey, Task

if TYPE_CHECKING:
    from kvdock_bench.sources import TaskData


# A prompt that stays further below its length, as a share of it, is filled up with words.
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample fitted to a length; fit is False when even the smallest one is too long."""

    sample: Sample
    prompt: Prompt
    units: int
    fit: bool


def fit_sample(
    task: Task,
    *,
    index: int,
    length: int,
    prompter: Prompter,
    seed: int,
    data: TaskData,
    args: Args | None = None,
) -> Fitted:
    """Fit one sample so that prompt tokens and generation budget stay within the length.

    Args:
        length: OWN_LENGTH leaves the prompt as the task makes it.
    """
    args = prompter.config.args_for(task) if args is None else {**task.defaults, **args}
    key = SampleKey(task.name, length, index, seed)
    if length == OWN_LENGTH:
        sample = replace(task.build(1, key, args, data), index=index)
        return Fitted(sample, prompter.render(sample), 1, fit=True)
    if data.sources.compat == "ruler":
        sample, units, fit = prompter.official.sample(
            task, index, length=length, seed=seed, prompter=prompter, data=data
        )
        return Fitted(sample, prompter.render(sample), units, fit)
    room = length - prompter.config.max_new_tokens(task)
    low, high = task.units(length, args, data)

    def attempt(units: int, fill: int = 0) -> tuple[Sample, int]:
        sample = replace(task.build(units, key, args, data, fill=fill), index=index)
        return sample, len(prompter.tokens(sample)[1])

    units, best, tokens = _largest(attempt, low, high, room)
    if length * TOLERANCE < room - tokens:
        fill, best, _ = _largest(partial(attempt, units), 0, room - tokens, room)
        best = replace(best, meta={**best.meta, "fill": fill})
    return Fitted(best, prompter.render(best), units, tokens <= room)


def _largest(
    attempt: Callable[[int], tuple[Sample, int]], low: int, high: int, room: int
) -> tuple[int, Sample, int]:
    """Return the largest size whose tokens fit, its sample and its tokens; at least `low`'s."""
    best, tokens = attempt(low)
    best_tokens, size, over, step = tokens, low, high + 1, 0
    here = before = (low, tokens)
    while best_tokens <= room and over - size > 1:
        step += 1
        probe = _next_probe(size, over, (before, here), room, bisect=step % 4 == 0)
        sample, tokens = attempt(probe)
        before, here = here, (probe, tokens)
        if tokens <= room:
            best, size, best_tokens = sample, probe, tokens
        else:
            over = probe
    return size, best, best_tokens


def _next_probe(
    units: int, over: int, last: tuple[tuple[int, int], tuple[int, int]], room: int, *, bisect: bool
) -> int:
    """Choose a number of units between one that fits and one that does not.

    Tokens grow almost evenly with units, so a line through the last two probes lands close to the
    answer and few long prompts are tokenized. Now and then the middle, against a line that creeps.
    """
    (x0, y0), (x1, y1) = last
    if bisect:
        guess = (units + over) // 2
    elif x0 == x1 or y0 == y1:
        guess = 2 * units + 1
    else:
        guess = x1 + (room - y1) * (x1 - x0) // (y1 - y0)
    return min(max(guess, units + 1), over - 1)
