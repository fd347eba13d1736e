"""Say what the published selections list on the planted data: densities, masses and errors.

It runs anywhere, in plain torch and `compat` mode, which keeps what the published code keeps:

    python benchmarks/speed/sparse_planted.py --lengths 32768 131072 --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import environment
from sparse_cases import DEVICE, PLANTED, SCALING, planted
from sparse_kernels import table
from sparse_selection import PARAMS, SAMPLED_QUERIES, covered, said
from torch import Tensor

from kvdock.kernels.blocks import BlockGrid, BlockLists, density, mask_from_lists
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.reference import find_pattern, select_reference

GAMMAS = (0.95, 0.9)


@torch.no_grad()
def main() -> None:
    """Measure every kind of data at every length; write after each row."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment(), "rows": []}
    for length in args.lengths:
        for name in args.data:
            data = PLANTED[name]
            layer = planted(length, data, heads=args.heads, kv_heads=args.kv_heads)
            query, key, _ = (states.float() for states in layer)
            for gamma in GAMMAS:
                options = FlexPrefillOptions(mode="compat", gamma=gamma)
                lists = select_reference(query, key, PARAMS, options)
                pattern = find_pattern(query, key, SCALING, options)
                row = {
                    "data": name, **asdict(data), "tokens": length, "heads": args.heads,
                    "gamma": gamma, "aware": int(pattern.aware.sum()),
                    "density": round(float(density(lists, length, length).mean()), 4),
                    "mass": round(covered(query, key, lists), 4),
                    "error": round(error(*layer, lists), 4),
                }  # fmt: skip
                record["rows"].append(said(row))
            if args.out:
                Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["rows"]))


def error(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists) -> float:
    """Return the relative Frobenius error of the output, over sampled queries."""
    length = query.shape[2]
    blocks = BlockGrid(length, length, lists.block).key_blocks
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randint(length, (SAMPLED_QUERIES,), generator=generator).to(query.device)
    position = torch.arange(length, device=query.device)
    mask = mask_from_lists(lists, blocks)[0, :, sampled // lists.block]
    group, apart, whole = query.shape[1] // key.shape[1], 0.0, 0.0
    for head in range(query.shape[1]):
        states = key[0, head // group].float(), value[0, head // group].float()
        logits = query[0, head, sampled].float() @ states[0].T * SCALING
        logits.masked_fill_(position > sampled[:, None], float("-inf"))
        dense = logits.softmax(-1) @ states[1]
        logits.masked_fill_(~mask[head][:, position // lists.block], float("-inf"))
        apart += float((logits.softmax(-1) @ states[1] - dense).square().sum())
        whole += float(dense.square().sum())
    return (apart / whole) ** 0.5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768])
    parser.add_argument("--data", nargs="+", choices=[*PLANTED], default=[*PLANTED])
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
