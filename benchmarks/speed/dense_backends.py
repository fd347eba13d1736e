"""Check and time every dense prefill backend that runs here, one Llama-3.1-8B layer at a time.

    python benchmarks/speed/dense_backends.py --out RESULTS.json

First each backend is compared with the float32 reference at odd sizes, with earlier tokens and with
rows of unequal length; a backend that fails is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import environment, milliseconds

from kvdock.kernels import BACKENDS, DenseBackend, probe_backends
from kvdock.kernels.reference import ReferenceBackend
from kvdock.policy import AttentionParams

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SIZES = ((1, 1), (127, 127), (129, 1000), (1000, 1000), (4097, 4097))
TOLERANCE = 2e-2
PARAMS = AttentionParams(HEAD_DIM**-0.5)


def main() -> None:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 131_072])
    parser.add_argument("--out")
    args = parser.parse_args()
    device, record = torch.device("cuda"), {"environment": environment(), "backends": []}
    for name, usable, reason in probe_backends():
        row: dict[str, Any] = {"backend": name, "usable": usable, "reason": reason}
        if usable and name != "reference":
            backend = BACKENDS[name](device, torch.bfloat16)
            row["worst_error"] = worst_error(backend)
            row["correct"] = row["worst_error"] < TOLERANCE
            if row["correct"]:
                row["ms"] = {length: round(layer_ms(backend, length), 2) for length in args.lengths}
        record["backends"].append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def states(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random bfloat16 query, key and value."""

    def make(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    return make(HEADS, queries), make(KV_HEADS, keys), make(KV_HEADS, keys)


def worst_error(backend: DenseBackend) -> float:
    """Return the largest relative error ‖out − ref‖ / ‖ref‖ over all sizes and the ragged form."""
    reference = ReferenceBackend()
    rows = [states(queries, keys) for queries, keys in SIZES]
    wanted = [reference.attend(*(x.float() for x in row), PARAMS) for row in rows]
    found = [backend.attend(*row, PARAMS) for row in rows]
    if backend.ragged is not None:
        wanted, found = wanted * 2, found + backend.ragged(rows, PARAMS)
    errors = [
        float((out.float() - ref).norm() / ref.norm())
        for out, ref in zip(found, wanted, strict=True)
    ]
    return max(errors)


def layer_ms(backend: DenseBackend, length: int) -> float:
    """Return the median time of one layer's causal attention."""
    row = states(length, length)
    times = [milliseconds(lambda: backend.attend(*row, PARAMS), repeats=3) for _ in range(3)]
    return statistics.median(times)


if __name__ == "__main__":
    main()
