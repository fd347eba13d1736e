"""Measure how much of a needle every method keeps: the digits that a retrieval prompt asks for.

For every layer and key/value head it counts, in `Dock.kept_positions`, the tokens of the value.
Every prompt goes through the model once; its queries, keys and values are then handed to the docked
layers of each method, since a prompt's states do not depend on what is kept of them. On the first
prompt the positions are compared with those of a whole forward under each method, at the first
budget. From the repository's root:

    python benchmarks/scripts/needle_coverage.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from recording import describe, parse_spec, write
from torch import Tensor

import kvdock
from kvdock.policy import AttentionParams
from kvdock_bench.config import make_config
from kvdock_bench.fitting import fit_sample
from kvdock_bench.models import Loaded, load, parse_device
from kvdock_bench.prompting import Prompter
from kvdock_bench.sources import load_data

METHODS = [
    "snapkv", "snapkv:kernel=21", "snapkv:window=16", "snapkv:kernel=21,window=16",
    "pyramidkv", "pyramidkv:kernel=21", "pyramidkv:window=16", "pyramidkv:kernel=21,window=16",
    "cakekv", "cakekv:kernel=21", "cakekv:window=16", "cakekv:kernel=21,window=16",
    "cam", "cam:window=16", "h2o", "l2compress", "streamingllm", "random",
]  # fmt: skip
Prompt = tuple[Tensor, list[int]]


class Unattended:
    """Stand for the attention kernel where its output is not needed."""

    name = "none"
    ragged = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Return memory of the output's shape, [b, Q, H, Dv]."""
        batch, heads, columns, _ = query.shape
        return query.new_empty(batch, columns, heads, value.shape[-1])


def main() -> None:
    """Measure every method at every budget on every prompt; print and write the table."""
    args = _arguments()
    loaded = load(args.model_path, dtype="float32", device=parse_device(args.device))
    record: dict[str, Any] = {
        "environment": describe("needle_coverage.py", args.methods, loaded.model.device),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
        "samples": args.samples,
        "lengths": args.lengths,
        "tasks": args.tasks,
    }
    found: dict[tuple[int, str, int], list[tuple[list[float], float]]] = defaultdict(list)
    first = True
    for length, (ids, needle) in prompts(loaded, args):
        calls = states(loaded.model, ids)
        for spec in args.methods:
            for budget in args.budgets:
                kept = replayed(loaded.model, spec, budget, calls)
                if first and budget == args.budgets[0]:
                    compare(loaded.model, spec, budget, ids, kept)
                found[length, spec, budget].append(coverage(kept, needle))
        if first:
            print(f"positions equal those of whole forwards: {len(args.methods)}", flush=True)
        first = False
    record["rows"] = [
        {"length": length, "method": spec, "budget": budget, **summary(pairs)}
        for (length, spec, budget), pairs in found.items()
    ]
    table(record["rows"], args)
    write(args.out, record)


def prompts(loaded: Loaded, args: argparse.Namespace) -> Any:
    """Yield (length, (ids [1, n], positions of the value's tokens)) for every sample."""
    config = make_config(
        {
            "benchmark_name": "RULER",
            "task_names": args.tasks,
            "length": args.lengths,
            "num_samples": args.samples,
            "template": "auto",
            "answer_prefix": "after_header",
            "generation": {"max_new_tokens": 24},
        },
        "needle_coverage",
    )
    prompter, data = Prompter(loaded.tokenizer, config), load_data(config.data)
    for length in args.lengths:
        for task in config.tasks:
            for index in range(args.samples):
                fitted = fit_sample(
                    task, index=index, length=length, prompter=prompter, seed=config.seed, data=data
                )
                ids = torch.tensor([fitted.prompt.input_ids], device=loaded.model.device)
                yield length, (ids, value_tokens(loaded, fitted))


def value_tokens(loaded: Loaded, fitted: Any) -> list[int]:
    """Return the positions of the tokens that write the value in the needle's sentence."""
    text, (value,) = fitted.prompt.text, fitted.sample.references
    if text.count(value) != 1:
        raise SystemExit(f"{value} stands {text.count(value)} times in the prompt, expected once.")
    encoded = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != fitted.prompt.input_ids:
        raise SystemExit("the prompt's tokens are not those of its text; offsets would mislead.")
    start = text.index(value)
    spans = enumerate(encoded["offset_mapping"])
    return [i for i, (begin, end) in spans if begin < start + len(value) and end > start]


@torch.inference_mode()
def states(model: Any, ids: Tensor) -> list[tuple[Any, ...]]:
    """Return the arguments of every layer's attention during one prompt."""
    calls: list[tuple[Any, ...]] = []
    with kvdock.attach(model, "streamingllm", budget=ids.shape[1]) as dock:
        cache = dock.new_cache()
        attend: Callable[..., Tensor] = cache.session.attend

        def noted(*call: Any) -> Tensor:
            calls.append(call)
            return attend(*call)

        cache.session.attend = noted  # type: ignore[assignment, method-assign]
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
    return calls


@torch.inference_mode()
def replayed(model: Any, spec: str, budget: int, calls: list[tuple[Any, ...]]) -> list[Tensor]:
    """Return every layer's kept positions [1, K, C] after the same prompt under a method."""
    with kvdock.attach(model, **{"budget": budget, **parse_spec(spec)}) as dock:
        policy = dock.plan.cache_policy
        if policy is not None and not policy.reads_lse:
            dock.plan.backend = Unattended()  # type: ignore[assignment]
        cache = dock.new_cache()
        for call in calls:
            cache.session.attend(*call)
        return [dock.kept_positions(layer) for layer in dock.plan.managed]


@torch.inference_mode()
def compare(model: Any, spec: str, budget: int, ids: Tensor, kept: list[Tensor]) -> None:
    """Stop where a whole forward under the method keeps other positions than the replay."""
    with kvdock.attach(model, **{"budget": budget, **parse_spec(spec)}) as dock:
        mask = torch.ones_like(ids)
        model(ids, attention_mask=mask, past_key_values=dock.new_cache(), logits_to_keep=1)
        for layer, mine in zip(dock.plan.managed, kept, strict=True):
            if not torch.equal(dock.kept_positions(layer), mine):
                raise SystemExit(f"{spec}, layer {layer}: the replay keeps other positions.")


def coverage(kept: list[Tensor], needle: list[int]) -> tuple[list[float], float]:
    """Return the share of layers' heads that keep each of the value's tokens, and all of them."""
    wanted = torch.tensor(needle, device=kept[0].device)
    held = torch.cat([(row[0][:, :, None] == wanted).any(1) for row in kept])
    return held.double().mean(0).tolist(), held.all(1).double().mean().item()


def summary(pairs: list[tuple[list[float], float]]) -> dict[str, Any]:
    """Return the means over prompts, in whole and by the token's place in the value."""
    kept = [statistics.fmean(tokens) for tokens, _ in pairs]
    return {
        "prompts": len(pairs),
        "kept": statistics.fmean(kept),
        "kept_se": statistics.stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else None,
        "whole": statistics.fmean(whole for _, whole in pairs),
        "by_place": [
            round(statistics.fmean(place), 4)
            for place in zip(*(tokens for tokens, _ in pairs), strict=True)
        ],
    }


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print one Markdown table per length: kept / whole, in per cent, at every budget."""
    cells = {(row["length"], row["method"], row["budget"]): row for row in rows}
    for length in args.lengths:
        print(f"\n{length} tokens: value's tokens kept / pairs that keep all of them, %\n")
        print("| method | " + " | ".join(map(str, args.budgets)) + " |")
        print("|---|" + "---|" * len(args.budgets))
        for spec in args.methods:
            line = [cells[length, spec, budget] for budget in args.budgets]
            shown = [f"{cell['kept']:.1%} / {cell['whole']:.1%}".replace("%", "") for cell in line]
            print(f"| {spec} | " + " | ".join(shown) + " |")
        print(f"\n{length} tokens: heads that keep the value's 1st, 2nd, … token, %\n")
        print("| method | budget | by place |\n|---|---|---|")
        for spec, budget in itertools.product(args.methods, args.budgets):
            places = cells[length, spec, budget]["by_place"]
            print(f"| {spec} | {budget} | {' '.join(f'{100 * share:.0f}' for share in places)} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="smollm2-135m")
    parser.add_argument("--device", nargs=1, help="cpu or a GPU's index; default the first GPU")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "niah_single_2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--samples", type=int, default=10, help="prompts per task and length")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
