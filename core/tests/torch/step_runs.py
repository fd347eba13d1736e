"""Run a decode step's fused kernels on small inputs and on tiny models; print errors as JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_step_kernels.py` runs it.
"""

import json
import os
import sys

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import kvdock
from kvdock.fused import FusedStep
from kvdock.kernels import slots, step_triton
from kvdock.testing import FAMILIES, Case, alone, left_padded

DEVICE = torch.device("cpu" if "--interpret" in sys.argv else "cuda")


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def off(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return (found.double() - wanted.double()).abs().max().item()


def norms(dtype, channels):
    norm = LlamaRMSNorm(channels, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(draw(channels, seed=3))
    left, right = draw(3, 1, channels, dtype=dtype), draw(3, 1, channels, seed=1, dtype=dtype)
    total, normed = step_triton.add_rms_norm(left, right, norm.weight, 1e-5)
    alone_ = step_triton.rms_norm(left, norm.weight, 1e-5)
    return max(
        off(total, left + right), off(normed, norm(left + right)), off(alone_, norm(left))
    )  # fmt: skip


def gates(dtype, channels):
    both = draw(2, 1, 2 * channels, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    return off(step_triton.gated(gate, up), F.silu(gate) * up)


def turns(dtype, dim, rows):
    query, key = draw(3, 1, 6, dim, dtype=dtype), draw(3, 1, 2, dim, seed=1, dtype=dtype)
    cos, sin = draw(rows, 1, dim, seed=2, dtype=dtype), draw(rows, 1, dim, seed=3, dtype=dtype)
    found = step_triton.rotate(query, key, cos, sin)
    wanted = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return max(off(*pair) for pair in zip(found, wanted, strict=True))


@torch.no_grad()
def model_runs(family):
    """Return the largest difference of the logits of four steps, and what was fused."""
    case = Case("streamingllm", family)
    model = case.model().to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in alone(left_padded((60,))[1][0]).items()}
    logits, count = [], 0
    for fused in (False, True):
        with kvdock.attach(model, "streamingllm", budget=32) as dock:
            step = FusedStep(model, step_triton) if fused else None
            count = step.count if step else 0
            cache, ids = dock.new_cache(), batch["input_ids"]
            out = model(**batch, past_key_values=cache)
            for token in range(4):
                column = {"input_ids": ids[:, token : token + 1], "past_key_values": cache}
                if step is None:
                    out = model(**column)
                else:
                    with step.active():
                        out = model(**column, output_hidden_states=token == 2)
                logits.append(out.logits)
    left = [type(module).__name__ for module in model.modules() if "forward" in module.__dict__]
    return {
        "error": max(off(logits[4 + i], logits[i]) for i in range(4)),
        "fused": count,
        "layers": model.config.num_hidden_layers,
        "left": left,
    }


kernels = {}
for kind in (torch.float32, torch.float16, torch.bfloat16):
    if kind == torch.bfloat16 and DEVICE.type == "cpu":
        continue  # the interpreter's NumPy knows no bfloat16
    name = str(kind)[6:]
    for width in (64, 96, 1000):
        kernels[f"norm {name} {width}"] = norms(kind, width)
        kernels[f"gate {name} {width}"] = gates(kind, width)
    for size, rows in ((64, 1), (96, 3), (128, 3)):
        kernels[f"turn {name} {size} {rows}"] = turns(kind, size, rows)
appends = slots._appends(step_triton.append, DEVICE, torch.float32)
families = {family: model_runs(family) for family in FAMILIES}
print(json.dumps({"kernels": kernels, "appends": appends, "families": families}))
