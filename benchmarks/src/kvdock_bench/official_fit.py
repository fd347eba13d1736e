"""Fit RULER's own samples: one sequence per task and length, kept while a run lasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvdock_bench.errors import BenchError
from kvdock_bench.tasks import Sample, Task
from kvdock_bench.tasks.fwe import FrequentWords
from kvdock_bench.tasks.official import Count, OfficialSamples
from kvdock_bench.tasks.official_makers import Chains, Coded, make_maker

if TYPE_CHECKING:
    from kvdock_bench.prompting import Prompter
    from kvdock_bench.sources import TaskData

Found = tuple[Sample, int, bool]
_EXAMPLE_LENGTH = 500


@dataclass
class OfficialFits:
    """Give samples as RULER's scripts make them.

    The prompt is counted as this config renders it: bit for bit RULER's "base" prompts come with
    `template: null`, RULER's own chat templates differ from those of tokenizers.
    """

    _made: dict[Any, Callable[[int], Found]] = field(default_factory=dict)

    def sample(
        self,
        task: Task,
        index: int,
        *,
        length: int,
        seed: int,
        prompter: Prompter,
        data: TaskData,
    ) -> Found:
        """Return a sample, its size, and whether it fits."""
        place = (task.name, length, seed, id(prompter), id(data))
        if place not in self._made:
            self._made[place] = self._sequence(task, length, seed, prompter, data)
        return self._made[place](index)

    def _sequence(
        self, task: Task, length: int, seed: int, prompter: Prompter, data: TaskData
    ) -> Callable[[int], Found]:
        if task.name in prompter.config.task_args:
            raise BenchError(
                f"data.compat: ruler knows {task.name} at its official settings only; take "
                f"task_args.{task.name} out."
            )
        budget = prompter.config.max_new_tokens(task)

        def count(sample: Sample, after: str) -> int:
            return len(prompter.tokenizer.tokenize(prompter.text(sample) + after))

        if isinstance(task, FrequentWords):
            return _coded(Coded(task, length=length, seed=seed), length, count)
        maker = make_maker(task, length=length, seed=seed, data=data)
        if maker is None:
            raise BenchError(f"data.compat: ruler has no task {task.name!r}.")
        if isinstance(maker, Chains):
            example = OfficialSamples(maker, length=_EXAMPLE_LENGTH, budget=budget, count=count)
            maker.finish_example(example.sample(0)[0])
        return OfficialSamples(maker, length=length, budget=budget, count=count).sample


def _coded(coded: Coded, length: int, count: Count) -> Callable[[int], Found]:
    """Fit as the script does: against the whole length, the answer's room not taken off."""
    step, total = length // 32, length // 6
    words = coded.vocabulary()
    while count(coded.text(words, total), "") < length:
        total += step
    total -= step
    made: list[Found] = []

    def sample(index: int) -> Found:
        while len(made) <= index:
            drawn, size = coded.vocabulary(), total
            while count(coded.text(drawn, size), "") > length:
                size -= step
            made.append((replace(coded.text(drawn, size), index=len(made)), size, True))
        return made[index]

    return sample
