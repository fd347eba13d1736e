"""Measure long prompts on a GPU: time to first token, ms per token, peak and cache memory.

One run measures the plain transformers model and every method side by side, in one process, on the
Llama-3.1-8B shape with random weights (no download). Run it from the repository's root:

    python benchmarks/speed/long_prompt.py --methods snapkv streamingllm --out RESULTS.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from baseline import GIB, Marks, cache_bytes, llama_8b
from measure import environment, event
from transformers import LlamaForCausalLM, LogitsProcessorList

import kvdock
from kvdock.kernels.sdpa import SDPABackend
from kvdock.layer import LayerStore
from kvdock.policy import AttentionParams


def main() -> None:
    """Measure, check, print a table and write the numbers."""
    args = _arguments()
    model = llama_8b(args.layers)
    shape = f"Llama-3.1-8B, random weights, bfloat16, {args.layers} layers, sdpa"
    record: dict[str, Any] = {"environment": environment(shape=shape), "runs": [], "checks": []}
    for length in args.lengths:
        prompt = torch.randint(10, 120_000, (args.batch, length), device="cuda")
        if length <= args.check_up_to:
            record["checks"].append(same_logits(model, prompt[:1], args))
        warm_attention(model, prompt)
        for system in ["full", *args.methods]:
            row = measure(model, system, prompt, args)
            record["runs"].append(row)
            print(json.dumps(row), flush=True)
    print_table(record["runs"])
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def measure(
    model: LlamaForCausalLM, system: str, prompt: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Run one system on one prompt several times; medians after a warm-up on its first tokens."""
    ttft, step, choosing = [], [], []
    short = prompt[:, : args.warm_up_tokens]
    with ExitStack() as stack:
        dock, selection = None, None
        if system != "full":
            dock = stack.enter_context(attached(model, system, args))
            selection = stack.enter_context(SelectionTimer())
        for text in [short, *[prompt] * args.repeats]:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            marks = Marks()
            output = model.generate(
                text,
                attention_mask=torch.ones_like(text),
                max_new_tokens=args.new_tokens if text is prompt else 4,
                do_sample=False,
                logits_processor=LogitsProcessorList([marks]),
                return_dict_in_generate=True,
            )
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            times = marks.every_ms()
            spent = selection.milliseconds() if selection else 0.0
            bytes_held = held(output.past_key_values, dock)
            del output, marks
            if text is prompt:
                ttft.append(times[0])
                step.append(statistics.median(times[1:]))
                choosing.append(spent)
    return {
        "system": system,
        "tokens": prompt.shape[1],
        "batch": prompt.shape[0],
        "budget": args.budget if system != "full" and takes_budget(system) else None,
        "ttft_ms": round(statistics.median(ttft), 2),
        "ms_per_token": round(statistics.median(step), 3),
        "selection_ms": round(statistics.median(choosing), 2),
        "every_ttft_ms": [round(time, 2) for time in ttft],
        "peak_gib": round(peak / GIB, 3),
        "kv_gib": round(bytes_held / GIB, 4),
        "repeats": args.repeats,
    }


def warm_attention(model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    """Attend once at a prompt's size: what a library plans for a new shape is not timed later."""
    config, (batch, length) = model.config, prompt.shape
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    draw = [torch.randn(batch, length, h, config.head_dim, device="cuda") for h in heads]
    query, key, value = (x.to(model.dtype).transpose(1, 2) for x in draw)
    del draw
    backend, params = SDPABackend(), AttentionParams(config.head_dim**-0.5)
    backend.attend(query, key, value, params)
    backend.attend_lse(query, key, value, params)


def attached(model: LlamaForCausalLM, system: str, args: argparse.Namespace) -> Any:
    """Attach one method (or composition) with the run's budget, if it takes one, and backend."""
    budget = args.budget if takes_budget(system) else None
    return kvdock.attach(model, system, budget=budget, backend=args.backend)


def takes_budget(system: str) -> bool:
    """Say whether one of the methods drops tokens; a budget is refused by the others."""
    records = [kvdock.default_host().load(id) for id in system.split("+")]
    return any(record.default_budget is not None for record in records)


def held(cache: Any, dock: Any) -> int:
    """Return the bytes of keys and values a cache has allocated."""
    if dock is not None:
        return int(dock.report().bytes_held)
    return cache_bytes(cache)


class SelectionTimer:
    """Time what a cache method adds to prefill: choosing and moving, on the device's clock."""

    def __enter__(self) -> SelectionTimer:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._original = {name: getattr(LayerStore, name) for name in ("_select", "_store")}
        for name, function in self._original.items():
            setattr(LayerStore, name, self._timed(function))
        return self

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = event()
            result = function(*args, **kwargs)
            self._pairs.append((start, event()))
            return result

        return timed

    def milliseconds(self) -> float:
        """Return the time since the last call, after the device is done."""
        total = sum(start.elapsed_time(stop) for start, stop in self._pairs)
        self._pairs.clear()
        return total

    def __exit__(self, *error: object) -> None:
        for name, function in self._original.items():
            setattr(LayerStore, name, function)


@torch.no_grad()
def same_logits(
    model: LlamaForCausalLM, prompt: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Compare the plain model's prefill logits with every method's, bit for bit."""
    plain = model(prompt, logits_to_keep=1).logits
    result: dict[str, Any] = {"tokens": prompt.shape[1]}
    for system in args.methods:
        budget = args.budget if takes_budget(system) else None
        with kvdock.attach(model, system, budget=budget) as dock:
            logits = model(prompt, past_key_values=dock.new_cache(), logits_to_keep=1).logits
        result[system] = bool(torch.equal(plain, logits))
    print("prefill logits bit-identical:", result, flush=True)
    return result


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print the runs as a Markdown table, each method's TTFT against the plain model's."""
    columns = ["tokens", "batch", "system", "ttft_ms", "overhead", "selection_ms", "ms_per_token"]
    columns += ["peak_gib", "kv_gib"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    base = {(run["tokens"], run["batch"]): run for run in runs if run["system"] == "full"}
    for run in runs:
        full = base[run["tokens"], run["batch"]]
        cells = {**run, "overhead": f"{run['ttft_ms'] / full['ttft_ms'] - 1:+.2%}"}
        print("| " + " | ".join(str(cells[name]) for name in columns) + " |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["snapkv", "streamingllm"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 131_072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--backend", default=None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm-up-tokens", type=int, default=20_480)
    parser.add_argument("--check-up-to", type=int, default=32_768)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
