"""Compare captured with eager tokens on a tiny model; `decode_graph.py check` runs it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import kvdock
from kvdock import decode, graph
from kvdock.testing import Case, alone, generate, left_padded

LENGTHS = (97, 70, 33)
FORMS = ("kivi", "think", "snapkv+kivi", "snapkv+think", "think+kivi", "snapkv+think+kivi")
"""Methods and compositions whose storage is not the core's own."""


class Captures:
    """Count and time the captures inside the block, and refuse to let one fail silently."""

    def __enter__(self) -> Captures:
        self.count, self.seconds, self.failed = 0, 0.0, []
        self._original: Callable[..., None] = graph.StepGraph._capture

        def timed(step: Any, run: Any) -> None:
            torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                self._original(step, run)
            except graph.CaptureError as error:
                self.failed.append(str(error))
                raise
            finally:
                torch.cuda.synchronize()
                self.seconds += time.perf_counter() - start
            self.count += 1

        graph.StepGraph._capture = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        graph.StepGraph._capture = self._original  # type: ignore[method-assign]


def check(args: argparse.Namespace) -> dict[str, str]:
    """Compare captured with eager tokens for every method, over 300 tokens and growth steps."""
    batch, (row, *_) = left_padded(LENGTHS)
    outcome = {}
    methods = args.methods or dict.fromkeys([*kvdock.available(), *FORMS])
    checks = [
        (method if family == "llama" else f"{method} on {family}", Case(method, family), _check_one)
        for family in args.families
        for method in methods
    ]
    # float32 is attended to in plain torch by some; their kernels serve half precision
    if "llama" in args.families:
        halves = [method for method in methods if method in FORMS]
        checks += [(f"{method}, half", Case(method), _check_half) for method in halves]
    for name, case, compare in checks:
        try:
            outcome[name] = compare(case, on_gpu(batch), on_gpu(alone(row)))
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        print("check", name, outcome[name], flush=True)
    outcome["sampling after a failed capture"] = _check_recovery(on_gpu(batch))
    print("check recovery:", outcome["sampling after a failed capture"], flush=True)
    return outcome


def _check_one(case: Case, batch: dict[str, Any], row: dict[str, Any]) -> str:
    model = case.model().cuda()
    runs: list[list[Any]] = []
    counts = []
    for mode in (False, "auto"):
        with Captures() as captures, case.attach(model, graph=mode) as dock:
            if mode and dock.plan.decode is None:
                return "eager: " + str(decode._obstacle(model, dock.plan, True))
            tokens = [generate(model, row, max_new_tokens=300)]
            tokens.append(generate(model, batch, max_new_tokens=60))
            dock.report()
            tokens.append(generate(model, batch, max_new_tokens=60, eos_token_id=list(range(12))))
            torch.manual_seed(0)
            tokens.append(generate(model, batch, max_new_tokens=40, do_sample=True))
            runs.append(tokens)
            counts.append((captures.count, captures.failed))
    same = [torch.equal(*pair) for pair in zip(*runs, strict=True)]
    captured, failed = counts[1]
    good = all(same) and captured >= 4 and not failed
    return f"{'equal' if good else 'DIFFERENT'}: {same}, {captured} captures, failed {failed}"


def _check_half(case: Case, batch: dict[str, Any], row: dict[str, Any]) -> str:
    """Compare captured steps with the same kernels uncaptured, and say how eager ones agree.

    Eager steps share a row's tokens among another number of programs and run norms and products as
    separate operations, which rounds differently: in half precision a random model's tokens then
    part somewhere, while they have to be those of the same kernels without a graph.
    """
    model = case.model().cuda().half()
    runs: dict[str, list[Any]] = {}
    original = graph.StepGraph.step
    for kind, mode in (("eager", False), ("uncaptured", "auto"), ("graph", "auto")):
        if kind == "uncaptured":
            graph.StepGraph.step = lambda step, run, inputs, rest: run(inputs)  # type: ignore[method-assign]
        try:
            with Captures() as captures, case.attach(model, graph=mode) as dock:
                tokens = [generate(model, row, max_new_tokens=300)]
                stops = list(range(3))
                tokens.append(generate(model, batch, max_new_tokens=300, eos_token_id=stops))
                dock.report()
                runs[kind] = tokens
        finally:
            graph.StepGraph.step = original  # type: ignore[method-assign]
    same = [torch.equal(*pair) for pair in zip(runs["uncaptured"], runs["graph"], strict=True)]
    part = [_agreement(*pair) for pair in zip(runs["eager"], runs["graph"], strict=True)]
    good = all(same) and captures.count >= 3 and not captures.failed
    return (
        f"{'equal' if good else 'DIFFERENT'}: {same}, {captures.count} captures, failed"
        f" {captures.failed}; eager tokens agree for {part} steps"
    )


def _agreement(left: torch.Tensor, right: torch.Tensor) -> int:
    """Return the steps before the first token that differs in any row."""
    columns = min(left.shape[1], right.shape[1])
    equal = (left[:, :columns] == right[:, :columns]).all(0)
    return int(equal.long().cumprod(0).sum())


def _check_recovery(batch: dict[str, Any]) -> str:
    """Break a capture on purpose: decode and sampling have to go on eagerly, with equal tokens."""
    model, runs = Case("snapkv").model().cuda(), []
    original = graph.StepGraph._warm_up

    def unwatched(step: Any, run: Any) -> Any:
        output = original(step, run)
        step._obstacle = None  # as if the wait had not been seen
        return output

    def wait(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.sum().item()

    try:
        for mode in (False, "auto"):
            with Captures() as captures, Case("snapkv").attach(model, graph=mode):
                hook = model.lm_head.register_forward_hook(wait)
                graph.StepGraph._warm_up = unwatched  # type: ignore[method-assign]
                torch.manual_seed(0)
                runs.append(generate(model, batch, max_new_tokens=40, do_sample=True))
                hook.remove()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        graph.StepGraph._warm_up = original  # type: ignore[method-assign]
    good = torch.equal(*runs) and len(captures.failed) == 1
    return f"{'equal' if good else 'DIFFERENT'}, failed {captures.failed}"


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the batch on the GPU."""
    return {name: tensor.cuda() for name, tensor in batch.items()}
