"""Measure what a compressed cache costs in perplexity, paired with the full cache.

A context of the shipped novel is read as a prompt and compressed; the text after it is fed in one
forward on the same cache, a later turn whose queries attend over the compressed past. The score of
a window is the mean negative log-likelihood (nats) of the tokens that this forward predicts, the
same tokens at every context length and with every method. From the repository's root:

    python benchmarks/scripts/perplexity.py --methods kivi:bits=4,group_size=32 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from recording import describe, parse_spec, write
from torch import Tensor
from transformers import DynamicCache

import kvdock
from kvdock_bench.haystack import load_haystack
from kvdock_bench.models import Loaded, load, parse_device

FULL = "full"


def main() -> None:
    """Score every window with the full cache and with every method; print a table."""
    args = _arguments()
    device = parse_device(args.device)
    loaded = load(args.model_path, dtype=args.dtype, device=device)
    record: dict[str, Any] = {
        "environment": describe("perplexity.py", args.methods, loaded.model.device),
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
        "text": load_haystack("austen").label,
        "windows": args.windows,
        "scored_tokens_per_window": args.tokens,
        "rows": [],
    }
    for context in args.contexts:
        windows = cut(loaded, args, context)
        full = [score(loaded.model, window, context, None)[0] for window in windows]
        record["rows"].append(row(FULL, context, full, full, 1.0))
        show(record["rows"][-1])
        for spec in args.methods:
            run = functools.partial(method, loaded, spec, windows, context, full)
            record["rows"].append({"method": spec, "context": context} | guarded(run))
            show(record["rows"][-1])
    table(record["rows"])
    write(args.out, record)


def cut(loaded: Loaded, args: argparse.Namespace, context: int) -> list[Tensor]:
    """Return W windows [1, context + M + 1], spread over the novel.

    The first token after the context is the same whatever the context, which starts with the
    tokenizer's own first token where it has one.
    """
    text = " ".join(load_haystack("austen").take(load_haystack("austen").n_words))
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = loaded.tokenizer("")["input_ids"][:1]
    first, last = max(args.contexts), len(ids) - args.tokens - 1
    if last < first:
        raise SystemExit(
            f"--contexts {first}: the novel has {len(ids)} tokens, context and {args.tokens + 1}"
            " scored ones do not fit. Lower --contexts or --tokens."
        )
    step = (last - first) / max(args.windows - 1, 1)
    starts = [first + round(step * index) for index in range(args.windows)]
    rows = [begin + ids[at - context + len(begin) : at + args.tokens + 1] for at in starts]
    return [torch.tensor([one], device=loaded.model.device) for one in rows]


@torch.inference_mode()
def score(model: Any, window: Tensor, context: int, dock: Any) -> tuple[float, float]:
    """Return the mean NLL of one window, and the cache's share of the full one after the context.

    Args:
        window: int64 [1, context + M + 1]; the last M are scored.
    """
    cache = DynamicCache(config=model.config) if dock is None else dock.new_cache()
    mask = torch.ones_like(window[:, :-1])
    # the whole prompt in one forward: its end is where methods act
    model(
        window[:, :context],
        attention_mask=mask[:, :context],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    held = 1.0
    if dock is not None:
        report = dock.report()
        held = report.bytes_held / report.bytes_full
    logits = model(
        window[:, context:-1], attention_mask=mask, past_key_values=cache, use_cache=True
    ).logits
    wanted = window[0, context + 1 :]
    loss = torch.nn.functional.cross_entropy(logits[0].float(), wanted)
    return loss.item(), held


def method(
    loaded: Loaded, spec: str, windows: list[Tensor], context: int, full: list[float]
) -> dict[str, Any]:
    """Score all windows with one method."""
    with kvdock.attach(loaded.model, **parse_spec(spec)) as dock:
        scores = [score(loaded.model, window, context, dock) for window in windows]
    held = statistics.fmean(share for _, share in scores)
    return row(spec, context, [loss for loss, _ in scores], full, held)


def row(
    name: str, context: int, losses: list[float], full: list[float], held: float
) -> dict[str, Any]:
    """Return one line of the table; the standard error is that of the windows' differences."""
    apart = [loss - plain for loss, plain in zip(losses, full, strict=True)]
    mean, several = statistics.fmean(apart), len(apart) > 1
    return {
        "method": name,
        "context": context,
        "perplexity": math.exp(statistics.fmean(losses)),
        "nll_difference": mean,
        "standard_error": statistics.stdev(apart) / len(apart) ** 0.5 if several else None,
        "perplexity_ratio": math.exp(mean),
        "cache_share": held,
        "nll": losses,
    }


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result, or the error as a text, so that one method does not hide the others."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def show(line: dict[str, Any]) -> None:
    """Print one row as it comes."""
    print({name: value for name, value in line.items() if name != "nll"}, flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    print("| context | method | perplexity | NLL − full | s.e. | ratio | cache |")
    print("|---|---|---|---|---|---|---|")
    for line in rows:
        start = f"| {line['context']} | {line['method']} |"
        if "error" in line:
            print(f"{start} {line['error']} | | | | |")
            continue
        error = line["standard_error"]
        shown = "" if error is None else f"{error:.5f}"
        print(
            f"{start} {line['perplexity']:.4f} | {line['nll_difference']:+.5f} | {shown} |"
            f" {line['perplexity_ratio']:.5f} | {line['cache_share']:.4f} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", nargs=1, help="cpu or a GPU's index; default the first GPU")
    parser.add_argument("--methods", nargs="+", default=["kivi:bits=4,group_size=32"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="scored tokens a window")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
