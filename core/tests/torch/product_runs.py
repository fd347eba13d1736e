"""Run the products of few rows on small inputs and print errors against float64 as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_products.py` runs it.
"""

import json
import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from kvdock.kernels.products_triton import Tile, gated_product, products

DEVICE = torch.device("cpu" if "--interpret" in sys.argv else "cuda")
SIZES = {"even": ((64, 32, 32), 512), "odd": ((70, 3, 17), 300), "one": ((41,), 1000)}
LANES, CORES = Tile(4, 256, 1), Tile(16, 128, 2, 3, 128)


def draw(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def off(found, wanted):
    """Return the largest difference in units of the last place of the largest value."""
    assert found.isfinite().all() and found.shape == wanted.shape
    unit = torch.finfo(found.dtype).eps * wanted.abs().max().item()
    return (found.double() - wanted).abs().max().item() / unit


def case(outputs, inputs, rows, dtype, biased):
    states = draw(rows, 1, inputs, seed=rows, dtype=dtype)
    weights = [draw(n, inputs, seed=9 + i, dtype=dtype) for i, n in enumerate(outputs)]
    biases = [draw(n, seed=n, dtype=dtype) * 8 if biased else None for n in outputs]
    wanted = [
        F.linear(states.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    return states, weights, biases, wanted


def ungated(outputs, inputs, rows, dtype, biased, lanes):
    states, weights, biases, wanted = case(outputs, inputs, rows, dtype, biased)
    found = products(states, weights, biases, LANES if lanes else CORES, lanes=lanes)
    return max(off(*pair) for pair in zip(found, wanted, strict=True))


def gated(outputs, inputs, rows, dtype, biased, lanes):
    both = (outputs[0], outputs[0])
    states, weights, biases, wanted = case(both, inputs, rows, dtype, biased)
    found = gated_product(states, weights, biases, LANES if lanes else CORES, lanes=lanes)
    gate, up = (part.to(dtype).double() for part in wanted)
    return off(found, F.silu(gate).to(dtype).double() * up)


def part_of_one_weight(dtype):
    """Gate and up in one weight, as its two halves."""
    states, (whole,), _, _ = case((96,), 160, 2, dtype, False)
    halves = list(whole.chunk(2))
    found = gated_product(states, halves, [None, None], CORES)
    gate, up = (F.linear(states.double(), half.double()).to(dtype).double() for half in halves)
    return off(found, F.silu(gate).to(dtype).double() * up)


runs = {}
kinds = [torch.float32, torch.float16] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16]
for kind in kinds:
    name = str(kind)[6:]
    for size, (outputs, inputs) in SIZES.items():
        for biased in (False, True):
            for rows in (1, 3, 8):
                lanes = rows == 1
                if not lanes and kind == torch.float32:
                    continue  # tensor cores would round its factors
                given = (outputs, inputs, rows, kind, biased, lanes)
                label = f"{name} {size} {rows} {'bias' if biased else 'plain'}"
                runs[f"{label} products"] = ungated(*given)
                runs[f"{label} gated"] = gated(*given)
    if kind != torch.float32:
        runs[f"{name} one row on cores"] = ungated((41,), 300, 1, kind, False, False)
        runs[f"{name} halves"] = part_of_one_weight(kind)
twice = [case((48,), 320, 3, torch.float16, False)[:3] for _ in range(2)]
same = [products(*given)[0] for given in twice]
print(json.dumps({"runs": runs, "same": torch.equal(*same)}))
