"""Check and time sparse prefill on a GPU: kernels, their variants, selection, and whole prompts.

    python benchmarks/speed/sparse_prefill.py --sections check attention variants --out RESULTS.json

Every section first checks what it times and prints its tables last; TFLOP/s count attended work.
"""

from __future__ import annotations

import argparse
import json
import traceback
from pathlib import Path
from typing import Any

from measure import environment
from sparse_cases import PLANTED

SECTIONS = ("check", "attention", "variants", "lists", "selection", "crossover", "ttft")


def main() -> None:
    """Run the sections asked for; one that fails does not keep the others from running."""
    args = _arguments()
    record: dict[str, Any] = {"environment": environment(), "sections": {}}
    tables = []
    for name in args.sections:
        try:
            rows, table = _section(name, args)
            record["sections"][name] = rows
            tables.append(f"\n### {name}\n\n{table}")
        except Exception as error:  # the other sections are worth having
            traceback.print_exc()
            record["sections"][name] = f"{type(error).__name__}: {error}"
        if args.out:
            Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(tables), flush=True)


def _section(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    if name in ("check", "attention", "variants"):
        import sparse_kernels

        return sparse_kernels.run(name, args)
    if name in ("lists", "selection", "crossover"):
        import sparse_selection

        return sparse_selection.run(name, args)
    import sparse_prompts

    return sparse_prompts.run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS[:2]))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 131_072])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.05, 0.1, 0.3])
    parser.add_argument("--methods", nargs="+", default=["flexprefill", "xattention"])
    parser.add_argument("--data", nargs="+", choices=[*PLANTED], default=[*PLANTED][:2])
    parser.add_argument("--settings", type=int, help="of each method, the first so many settings")
    parser.add_argument("--backends", nargs="+", help="sparse backends to run; all by default")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16", "float16"]
    )
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 96, 128])
    parser.add_argument("--layers", type=int, default=32, help="layers of the whole model")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs, the median of which counts"
    )
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
