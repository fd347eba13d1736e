"""Time whole answers on a GPU: a long prompt and many new tokens, each method against plain use.

The baseline is the unmodified model with transformers' own cache; the methods run as `attach` gives
them, with captured decode. One process, the Llama-3.1-8B shape with random weights:

    python benchmarks/speed/end_to_end.py --batch 1 --methods full snapkv h2o --out RESULTS.json

Runs that stand in the file of results already stay, so that the parts of a table can be measured by
commands of their own, one after the other on the same machine:

    python benchmarks/speed/end_to_end.py --batch 8 --methods full --out RESULTS.json
    python benchmarks/speed/end_to_end.py --batch 8 --methods snapkv streamingllm --out RESULTS.json
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from baseline import GIB, llama_8b
from measure import environment

import kvdock
from kvdock.testing import Case

PIECE = 4096
"""Columns of a forward where the plain model cannot take the prompt at once."""
CASE = ("batch", "length", "new_tokens")


def main() -> None:
    """Time what is asked for; a failure is noted and does not stop the rest."""
    args = _arguments()
    model = llama_8b(args.layers)
    prompt = torch.randint(10, 120_000, (args.batch, args.length), device=model.device)
    shape = f"Llama-3.1-8B, random weights, bfloat16, {args.layers} layers"
    record: dict[str, Any] = {"environments": [], "runs": []}
    if args.out and Path(args.out).exists():
        record = json.loads(Path(args.out).read_text())
    record["environments"].append(environment(shape=shape))
    for system in args.methods:
        row: dict[str, Any] = {"system": system, "batch": args.batch, "length": args.length}
        row["new_tokens"] = args.new_tokens
        try:
            row |= timed(model, system, prompt, args)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(row), flush=True)
        record["runs"] = merged(record["runs"], row)
        if args.out:
            beside = Path(args.out).with_suffix(".part")
            beside.write_text(json.dumps(record, indent=1) + "\n")
            beside.replace(args.out)
    for row in record["runs"]:
        print(row["system"], *(row[name] for name in CASE), row.get("total_s"),
              row.get("times_faster"))  # fmt: skip


def merged(runs: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs with this one in place of an older one, each compared with its full cache."""
    case = ("system", "budget", *CASE)
    kept = [old for old in runs if any(old.get(name) != row.get(name) for name in case)]
    runs = [*kept, row]
    for run in runs:
        for full in runs:
            alike = full["system"] == "full" and all(full[name] == run[name] for name in CASE)
            if alike and "total_s" in full and "total_s" in run:
                run["times_faster"] = round(full["total_s"] / run["total_s"], 2)
    return runs


def timed(
    model: Any, system: str, prompt: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of one `generate()` call after a short one that warms libraries up."""
    if system == "full":
        try:
            return _generate(model, prompt, args)
        except torch.cuda.OutOfMemoryError:
            print(f"no memory for the prompt at once: pieces of {PIECE}", flush=True)
        return _generate(model, prompt, args, prefill_chunk_size=PIECE) | {"pieces_of": PIECE}
    budgeted = any(record.default_budget for record in Case(system).records)
    budget = {"budget": args.budget} if budgeted else {}
    with kvdock.attach(model, system, **budget) as dock:
        row = _generate(model, prompt, args)
        row["kv_gib"] = round(dock.report().bytes_held / GIB, 3)
    return row | budget


def _generate(
    model: Any, prompt: torch.Tensor, args: argparse.Namespace, **settings: Any
) -> dict[str, Any]:
    for text, count in ((prompt[:, :2304], 4), (prompt, args.new_tokens)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            **settings,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert output.shape[1] == text.shape[1] + count
        del output
    peak = torch.cuda.max_memory_allocated() / GIB
    return {"total_s": round(seconds, 3), "peak_gib": round(peak, 2)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["full", "snapkv"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
