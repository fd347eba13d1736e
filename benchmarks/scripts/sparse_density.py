"""Measure how sparse sparse prefill is on real states: density, output error, attention covered.

Prompts go through the dense model once; every layer's queries, keys and values are then selected
from, by plain torch. The error and the share of true attention covered are taken from sampled
queries: ‖sparse − dense‖ / ‖dense‖ of a layer's output, all heads together, and the heads' mean.
From the repository's root:

    python benchmarks/scripts/sparse_density.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from recording import describe, parse_spec, write
from torch import Tensor

import kvdock
from kvdock.kernels.blocks import BlockGrid, BlockLists, density, mask_from_lists
from kvdock.policy import AttentionParams, AttentionPolicy
from kvdock_bench.config import make_config
from kvdock_bench.fitting import fit_sample
from kvdock_bench.models import Loaded, load, parse_device
from kvdock_bench.prompting import Prompter
from kvdock_bench.sources import load_data
from kvdock_flexprefill import selection as flexprefill
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_xattention import select as xattention
from kvdock_xattention.options import XAttentionOptions

KINDS: dict[str, Any] = {
    "flexprefill": (flexprefill.select_reference, FlexPrefillOptions),
    "xattention": (xattention.select_reference, XAttentionOptions),
}
METHODS = [
    *(
        f"flexprefill:mode={mode},gamma={gamma},min_budget=256"
        for gamma in (0.95, 0.9)
        for mode in ("exact", "compat")
    ),
    *(f"xattention:mode={mode},stride={s}" for s in (8, 16) for mode in ("exact", "compat")),
]
Figures = dict[str, list[float]]


class Recorder(AttentionPolicy):
    """Measure every method on each layer's states, and leave attention to the dense kernel."""

    def __init__(self, methods: list[str], sampled: int) -> None:
        self.methods = {spec: parse_spec(spec) for spec in methods}
        self.sampled = sampled
        self.found: dict[str, Figures] = {}

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, *, layer: int
    ) -> Tensor | None:
        """Add a layer's figures."""
        generator = torch.Generator().manual_seed(layer)
        rows = torch.randperm(query.shape[2], generator=generator)[: self.sampled]
        rows = rows.to(query.device)
        weights = attention(query[0, :, rows], key[0], params.scaling, rows)
        values = value[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        dense = weights @ values
        for spec, given in self.methods.items():
            select, kind = KINDS[given["methods"]]
            options = kind(**{k: v for k, v in given.items() if k != "methods"})
            lists = select(query, key, params, options)
            figures = compared(weights, values, dense, lists, rows, key.shape[2])
            figures["density"] = float(density(lists, query.shape[2], key.shape[2]).mean())
            kept = self.found.setdefault(spec, defaultdict(list))
            for name, figure in figures.items():
                kept[name].append(figure)
        return None


def attention(query: Tensor, key: Tensor, scaling: float, rows: Tensor) -> Tensor:
    """Return the probabilities [H, S, N] of queries [H, S, D] that stand at ``rows``."""
    keys = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = query @ keys.transpose(1, 2) * scaling
    future = torch.arange(key.shape[1], device=key.device) > rows[:, None]
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def compared(
    weights: Tensor, values: Tensor, dense: Tensor, lists: BlockLists, rows: Tensor, length: int
) -> dict[str, float]:
    """Return the relative error of the output, and the share of attention on listed blocks."""
    mask = mask_from_lists(lists, BlockGrid(length, length, lists.block).key_blocks)[0]
    position = torch.arange(length, device=rows.device)
    listed = weights * mask[:, rows // lists.block][..., position // lists.block]
    mass = listed.sum(-1, keepdim=True)
    apart = (listed @ values) / mass - dense
    return {"error": float(apart.norm() / dense.norm()), "mass": float(mass.mean())}


def main() -> None:
    """Measure every method on every prompt; print and write the table."""
    args = _arguments()
    loaded = load(args.model_path, dtype="float32", device=parse_device(args.device))
    record: dict[str, Any] = {
        "environment": describe("sparse_density.py", args.methods, loaded.model.device),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
        "prompts": args.prompts,
        "sampled_queries": args.queries,
        "rows": [],
    }
    figures: dict[tuple[int, str], Figures] = defaultdict(lambda: defaultdict(list))
    for length, ids in prompts(loaded, args):
        start = time.time()
        for spec, found in measured(loaded.model, ids, args).items():
            for name, layers in found.items():
                figures[length, spec][name].append(statistics.fmean(layers))
        print(f"{length} tokens: {ids.shape[1]} read, {time.time() - start:.0f} s", flush=True)
        record["rows"] = [summary(*key, found) for key, found in figures.items()]
        write(args.out, record)
    print("\n".join(table(record["rows"])))


def prompts(loaded: Loaded, args: argparse.Namespace) -> Iterator[tuple[int, Tensor]]:
    """Yield (length, ids [1, n]): prompts of the tasks in turn, as many per length as asked for."""
    config = make_config(
        {
            "benchmark_name": "RULER",
            "task_names": args.tasks,
            "length": args.lengths,
            "num_samples": args.prompts[0],
            "template": "auto",
            "answer_prefix": "after_header",
            "generation": {"max_new_tokens": 24},
        },
        "sparse_density",
    )
    prompter, data = Prompter(loaded.tokenizer, config), load_data(config.data)
    for length, number in zip(args.lengths, args.prompts, strict=True):
        for index in range(number):
            task = config.tasks[index % len(config.tasks)]
            fitted = fit_sample(
                task, index=index, length=length, prompter=prompter, seed=config.seed, data=data
            )
            yield length, torch.tensor([fitted.prompt.input_ids], device=loaded.model.device)


@torch.inference_mode()
def measured(model: Any, ids: Tensor, args: argparse.Namespace) -> dict[str, Figures]:
    """Return every method's figures per layer on one prompt."""
    recorder = Recorder(args.methods, args.queries)
    with kvdock.attach(model, [recorder]) as dock:
        mask = torch.ones_like(ids)
        model(ids, attention_mask=mask, past_key_values=dock.new_cache(), logits_to_keep=1)
    return recorder.found


def summary(length: int, spec: str, found: Figures) -> dict[str, Any]:
    """Return means over prompts, and the least and the most of each."""
    row: dict[str, Any] = {"length": length, "method": spec, "n": len(found["density"])}
    for name in ("density", "error", "mass"):
        row[name] = round(statistics.fmean(found[name]), 4)
        row[f"{name}_range"] = [round(min(found[name]), 4), round(max(found[name]), 4)]
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as Markdown."""
    lines = ["| tokens | method | n | density | error | mass |", "|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        shown = " | ".join(f"{row[name]:.3f}" for name in ("density", "error", "mass"))
        lines.append(f"| {row['length']} | {row['method']} | {row['n']} | {shown} |")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="smollm2-135m")
    parser.add_argument("--device", nargs=1, help="cpu or a GPU's index; default the first GPU")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tasks", nargs="+", default=["light"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[6, 3, 2], help="per length, tasks in turn"
    )
    parser.add_argument("--queries", type=int, default=256, help="queries sampled per layer")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
