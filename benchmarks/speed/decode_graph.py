"""Measure decode steps on a GPU: eager and captured, every method against the plain full cache.

Sections, each a program run of its own if asked so (< 80 s each at the defaults):

    check    captured tokens equal eager ones on a tiny model, growth, padding, early stops included
    leak     allocated and reserved memory over 50 attach / generate / detach rounds
    speed    ms per token on the Llama-3.1-8B shape, with the time to capture and the floor
    static   the same step of the plain model: eager, and captured with a static cache
    apart    as speed, one process for every system, and the peers that can be imported
    capture  what captured decode costs before it runs: first use ever, new process, second use

    python benchmarks/speed/decode_graph.py check leak
    python benchmarks/speed/decode_graph.py speed --batch 1 --length 32768 --out RESULTS.json
    python benchmarks/speed/decode_graph.py apart --peer-python OTHER/bin/python --out RESULTS.json

What stands in the file of results already stays, so that short runs fill one table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from baseline import GIB, Marks, cache_bytes, llama_8b, weight_bytes
from decode_apart import apart, capture
from decode_check import LENGTHS, Captures, check, on_gpu
from measure import environment, event
from transformers import LogitsProcessorList, StaticCache

import kvdock
from kvdock import graph
from kvdock.testing import FAMILIES, Case, generate, left_padded

CASE = ("system", "graph", "batch", "length", "budget", "start")


def main() -> None:
    """Run the sections asked for; a failure in one is printed and does not stop the others."""
    args = _arguments()
    record: dict[str, Any] = {}
    if args.out and Path(args.out).exists():
        record = json.loads(Path(args.out).read_text())
    made: dict[str, Any] = {}
    for section in args.sections:
        try:
            made[section] = SECTIONS[section](args)
        except Exception as error:
            made[section] = f"{type(error).__name__}: {error}"
            print(section, "failed:", made[section], flush=True)
    measured = environment(shape=f"Llama-3.1-8B, random, bfloat16, {args.layers}")
    for run in [*(made.get("speed") or []), *(made.get("apart") or [])]:
        known = isinstance(run, dict) and {"bytes_read", "ms_per_token"} <= {*run}
        if known and "copy_tb_per_s" in measured:
            floor = run["bytes_read"] / measured["copy_tb_per_s"] / 1e9
            run["floor_ms"] = round(floor, 3)
            run["of_floor"] = round(floor / run["ms_per_token"], 3)
    for section, value in made.items():
        record[section] = merged(record.get(section), value)
    record.setdefault("environments", []).append(measured)
    print_table(record.get("speed"))
    print_table(record.get("apart"))
    if args.out:
        beside = Path(args.out).with_suffix(".part")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        beside.replace(args.out)


def merged(old: Any, new: Any) -> Any:
    """Return older results with the new ones in place of those of the same case."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | new
    if not isinstance(old, list) or not isinstance(new, list):
        return new
    known = [tuple(run.get(name) for name in CASE) for run in new]
    return [run for run in old if tuple(run.get(name) for name in CASE) not in known] + new


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


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every method eagerly and captured, beside the plain model's full cache."""
    model = llama_8b(args.layers)
    prompt = torch.randint(10, 120_000, (args.batch, args.length), device="cuda")
    jobs: list[tuple[str, Any]] = [("full", None)] if "full" in args.modes else []
    known = {"eager": False, "graph": "auto"}
    graphs = [known[mode] for mode in args.modes if mode in known]
    jobs += [(method, mode) for method in args.methods or kvdock.available() for mode in graphs]
    return [_timed(model, prompt, *job, args) for job in jobs]


def _timed(
    model: Any, prompt: torch.Tensor, system: str, mode: Any, args: argparse.Namespace
) -> dict[str, Any]:
    row: dict[str, Any] = {"system": system, "graph": mode, "batch": args.batch}
    row |= {"length": args.length, "budget": args.budget if system != "full" else None}
    gc.collect()
    torch.cuda.empty_cache()
    marks = Marks()
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False}
    settings["logits_processor"] = LogitsProcessorList([marks])
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    try:
        if system == "full":
            output = model.generate(**batch, **settings, return_dict_in_generate=True)
            held = cache_bytes(output.past_key_values)
            del output
        else:
            budget = {"budget": args.budget}
            if not any(r.default_budget for r in Case(system).records):
                budget = {}
            with Captures() as captures, kvdock.attach(model, system, graph=mode, **budget) as dock:
                model.generate(**batch, **settings)
                held = dock.report().bytes_held
            row |= {"captures": captures.count, "capture_s": round(captures.seconds, 3)}
            row["failed"] = captures.failed
        row |= {"ms_per_token": round(marks.step_ms(), 3), "kv_gib": round(held / GIB, 3)}
        row |= {"bytes_read": weight_bytes(model) + held, "start_s": marks.start_seconds()}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def static(args: argparse.Namespace) -> list[dict[str, Any]]:
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
    return [{"batch": args.batch, "length": args.length, **row}]


def print_table(runs: Any) -> None:
    """Print the timed runs as a Markdown table."""
    if not isinstance(runs, list):
        return
    columns = ["system", "graph", "batch", "length", "ms_per_token", "floor_ms", "of_floor"]
    columns += ["kv_gib", "budget", "captures", "capture_s", "start_s", "error"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for run in runs:
        print("| " + " | ".join(str(run.get(name, "")) for name in columns) + " |")


SECTIONS = {
    "check": check,
    "leak": leak,
    "speed": speed,
    "static": static,
    "apart": apart,
    "capture": capture,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=sorted(SECTIONS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["llama"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=40)
    modes = ["full", "eager", "graph", "peers"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes, metavar="MODE")
    parser.add_argument("--peer-python", help="interpreter that can import the peers")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
