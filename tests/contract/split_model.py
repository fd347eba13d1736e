"""One process of a split model: generate with every method and write what came out.

Usage: python split_model.py FOLDER RANK RANKS MEETING OUT METHOD...
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kvdock.testing import Case, generate, left_padded

LENGTHS = (97, 70, 33)


def answers(model, methods):
    """Return the tokens and the bytes of the plain model ("") and of every method."""
    batch, _ = left_padded(LENGTHS)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    found = {"": (generate(model, batch).tolist(), 0)}
    cases = {method: Case(method) for method in methods}
    if "snapkv" in cases:  # bytes of the whole cache, not of one process's part
        cases["bytes"] = Case("snapkv", budget="300KiB")
    for name, case in cases.items():
        with case.attach(model) as dock:
            tokens = generate(model, batch).tolist()
            found[name] = (tokens, dock.report().bytes_held)
    return found


def load_split(folder):
    """Return the model of a folder, split over the processes that have met."""
    try:
        from transformers.distributed import DistributedConfig

        known = "tp_plan" in DistributedConfig.__dataclass_fields__
    except ImportError:
        known = False
    if known:
        given = {"distributed_config": DistributedConfig(tp_plan="auto")}
    else:
        given = {"tp_plan": "auto"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()


def main(folder, rank, ranks, meeting, out, *methods):
    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    gpu = torch.device("cuda", int(rank)) if torch.cuda.device_count() >= int(ranks) else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    torch.distributed.init_process_group(
        "gloo" if gpu is None else "nccl",
        init_method=meeting,
        rank=int(rank),
        world_size=int(ranks),
        device_id=gpu,
    )
    found = answers(load_split(folder), methods)
    Path(out).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
