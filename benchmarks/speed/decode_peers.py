"""Time decode steps of other libraries that are installed, for `decode_graph.py apart`.

It needs torch and transformers only, so that a library whose releases of transformers are not
kvdock's can be timed by an interpreter that has them (`decode_graph.py apart --peer-python`).
Today that is kvpress: its presses with the same count of kept tokens, in plain `generate()`.

    python benchmarks/speed/decode_peers.py --length 32768 --budget 2048 --out ROWS.json
"""

from __future__ import annotations

import argparse
import gc
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from baseline import GIB, Marks, cache_bytes, llama_8b, weight_bytes
from transformers import LogitsProcessorList

PRESSES = ("SnapKVPress", "StreamingLLMPress", "KnormPress", "PyramidKVPress")


def main() -> None:
    """Time every peer; one that fails leaves its reason."""
    args = _arguments()
    rows: list[dict[str, Any]] = []
    if find_spec("kvpress") is None:
        print("kvpress is not installed here: no peer to time")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = llama_8b(args.layers, device)
        prompt = torch.randint(10, 120_000, (args.batch, args.length), device=device)
        for press in PRESSES:
            rows.append(timed(model, prompt, press, args))
            print(json.dumps(rows[-1]), flush=True)
    Path(args.out).write_text(json.dumps({"speed": rows}) + "\n")


def timed(model: Any, prompt: torch.Tensor, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return a press's milliseconds per token and the bytes its cache holds."""
    import kvpress

    row: dict[str, Any] = {"system": f"kvpress {name}", "graph": False, "batch": args.batch}
    row |= {"length": args.length, "budget": args.budget}
    row |= {"versions": {name: version(name) for name in ("kvpress", "transformers", "torch")}}
    gc.collect()
    try:
        press = getattr(kvpress, name)(compression_ratio=1 - args.budget / args.length)
        marks = Marks()
        with torch.no_grad(), press(model):
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=args.new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([marks]),
                return_dict_in_generate=True,
            )
        held = cache_bytes(output.past_key_values)
        row |= {"ms_per_token": round(marks.step_ms(), 3), "kv_gib": round(held / GIB, 3)}
        row |= {"bytes_read": weight_bytes(model) + held}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
