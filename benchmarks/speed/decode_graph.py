"""Measure decode steps on a GPU: eager and captured, every method against the plain full cache.

Sections, each a program run of its own if asked so (< 90 s each at the defaults):

    check    captured tokens equal eager ones on a tiny model, growth, padding, early stops included
    leak     allocated and reserved memory over 50 attach / generate / detach rounds
    speed    ms per token on the Llama-3.1-8B shape, with the time to capture and the floor
    static   the same step of the plain model: eager, and captured with a static cache

    python benchmarks/speed/decode_graph.py check leak
    python benchmarks/speed/decode_graph.py speed --batch 1 --length 32768 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from long_prompt import llama_8b
from measure import GIB, environment, event
from transformers import LogitsProcessorList, StaticCache

import kvdock
from kvdock import decode, graph
from kvdock.testing import Case, alone, generate, left_padded

LENGTHS = (97, 70, 33)
FORMS = ("kivi", "think", "snapkv+kivi", "snapkv+think", "think+kivi", "snapkv+think+kivi")
"""Methods and compositions whose storage is not the core's own."""


def main() -> None:
    """Run the sections asked for; a failure in one is printed and does not stop the others."""
    args = _arguments()
    record: dict[str, Any] = {}
    for section in args.sections:
        try:
            record[section] = SECTIONS[section](args)
        except Exception as error:
            record[section] = f"{type(error).__name__}: {error}"
            print(section, "failed:", record[section], flush=True)
    record["environment"] = environment(shape=f"Llama-3.1-8B, random, bfloat16, {args.layers}")
    for run in record.get("speed") or []:
        if "bytes_read" in run:
            floor = run["bytes_read"] / record["environment"]["copy_tb_per_s"] / 1e9
            run["floor_ms"] = round(floor, 3)
            run["of_floor"] = round(floor / run["ms_per_token"], 3)
    print_table(record.get("speed"))
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


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
    checks = [(method, method, _check_one) for method in methods]
    # float32 is attended to in plain torch by some; their kernels serve half precision
    checks += [(f"{method}, half", method, _check_half) for method in methods if method in FORMS]
    for name, method, compare in checks:
        try:
            outcome[name] = compare(method, on_gpu(batch), on_gpu(alone(row)))
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        print("check", name, outcome[name], flush=True)
    outcome["sampling after a failed capture"] = _check_recovery(on_gpu(batch))
    print("check recovery:", outcome["sampling after a failed capture"], flush=True)
    return outcome


def _check_one(method: str, batch: dict[str, Any], row: dict[str, Any]) -> str:
    case = Case(method)
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


def _check_half(method: str, batch: dict[str, Any], row: dict[str, Any]) -> str:
    """Compare captured steps with the same fixed shapes uncaptured, and say how eager ones agree.

    Eager steps share a row's tokens among another number of programs, which rounds differently: in
    half precision a random model's tokens then part somewhere, while they have to be those of the
    same kernels without a graph.
    """
    case = Case(method)
    model = case.model().cuda().half()
    runs: dict[str, list[Any]] = {}
    for kind, mode, frozen in (
        ("eager", False, "0"),
        ("fixed", "auto", "1"),
        ("graph", "auto", "0"),
    ):
        os.environ["KVDOCK_FROZEN"] = frozen
        with Captures() as captures, case.attach(model, graph=mode) as dock:
            tokens = [generate(model, row, max_new_tokens=300)]
            tokens.append(generate(model, batch, max_new_tokens=300, eos_token_id=list(range(3))))
            dock.report()
            runs[kind] = tokens
    del os.environ["KVDOCK_FROZEN"]
    same = [torch.equal(*pair) for pair in zip(runs["fixed"], runs["graph"], strict=True)]
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


def leak(args: argparse.Namespace) -> dict[str, Any]:
    """Compare memory before and after 50 rounds; the first two warm libraries up."""
    case, batch = Case((args.methods or ["h2o"])[0]), on_gpu(left_padded(LENGTHS)[0])
    model, sizes = case.model().cuda(), []
    for _ in range(52):
        with case.attach(model):
            generate(model, batch, max_new_tokens=40)
        gc.collect()
        torch.cuda.empty_cache()
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    result = {"rounds": 50, "before": sizes[1], "after": sizes[-1], "same": sizes[1] == sizes[-1]}
    print("leak", result, flush=True)
    return result


class Marks:
    """Record an event at every new token, as a logits processor."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores untouched."""
        self.events.append(event())
        return scores

    def milliseconds(self) -> float:
        """Return the median time of a step, the first five left out (warm-up, capture)."""
        torch.cuda.synchronize()
        pairs = zip(self.events[5:], self.events[6:], strict=False)
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every method eagerly and captured, beside the plain model's full cache."""
    model = llama_8b(args.layers)
    prompt = torch.randint(10, 120_000, (args.batch, args.length), device="cuda")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2  # only a row of it is read
    runs = [_timed(model, prompt, "full", None, weights, args)]
    for method in args.methods or kvdock.available():
        for mode in (False, "auto"):
            runs.append(_timed(model, prompt, method, mode, weights, args))
    return runs


def _timed(
    model: Any, prompt: torch.Tensor, system: str, mode: Any, weights: int, args: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"system": system, "graph": mode, "batch": args.batch}
    row["length"] = args.length
    gc.collect()
    torch.cuda.empty_cache()
    marks = Marks()
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False}
    settings["logits_processor"] = LogitsProcessorList([marks])
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    try:
        if system == "full":
            output = model.generate(**batch, **settings, return_dict_in_generate=True)
            layers = output.past_key_values.layers
            held = sum(t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values))
            del output, layers
        else:
            budget = {"budget": args.budget}
            if not any(r.default_budget for r in Case(system).records):
                budget = {}
            with Captures() as captures, kvdock.attach(model, system, graph=mode, **budget) as dock:
                model.generate(**batch, **settings)
                held = dock.report().bytes_held
            row |= {"captures": captures.count, "capture_s": round(captures.seconds, 3)}
            row["failed"] = captures.failed
        row |= {"ms_per_token": round(marks.milliseconds(), 3), "kv_gib": round(held / GIB, 3)}
        row["bytes_read"] = weights + held
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def static(args: argparse.Namespace) -> dict[str, Any]:
    """Time the plain model's step over a static full cache, eagerly and as a graph."""
    model = llama_8b(args.layers)
    cache = StaticCache(config=model.config, max_cache_len=args.length + 64)
    ids = torch.randint(10, 120_000, (args.batch, 1), device="cuda")
    place = torch.full((args.batch, 1), args.length, device="cuda")
    states = torch.zeros(args.batch, 8, args.length, 128, device="cuda", dtype=torch.bfloat16)
    for layer in range(args.layers):
        cache.update(states, states, layer)

    def step() -> Any:
        return model(ids, position_ids=place, past_key_values=cache).logits

    stream = graph.side_stream(ids.device)
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        step()
    times = {}
    for name, call in (("eager", step), ("captured", captured.replay)):
        times[name] = []
        for _ in range(10):
            start = event()
            call()
            stop = event()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    row = {name: round(statistics.median(values), 3) for name, values in times.items()}
    print("static full cache, ms per token", row, flush=True)
    return {"batch": args.batch, "length": args.length, **row}


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the batch on the GPU."""
    return {name: tensor.cuda() for name, tensor in batch.items()}


def print_table(runs: Any) -> None:
    """Print the timed runs as a Markdown table."""
    if not isinstance(runs, list):
        return
    columns = ["system", "graph", "batch", "length", "ms_per_token", "floor_ms", "of_floor"]
    columns += ["kv_gib", "captures", "capture_s", "error"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for run in runs:
        print("| " + " | ".join(str(run.get(name, "")) for name in columns) + " |")


SECTIONS = {"check": check, "leak": leak, "speed": speed, "static": static}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=sorted(SECTIONS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
