"""A model split over two processes gives every method's tokens as one process does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvdock import available
from kvdock.testing import tiny_model

SCRIPT = Path(__file__).with_name("split_model.py")
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
RANKS = 2


def load_script():
    spec = importlib.util.spec_from_file_location("split_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def runs(request, tmp_path_factory):
    """The answers of one process, and of each of two; of phi3, every process has all heads."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, **SHAPE)
    model.save_pretrained(folder)
    outs = [folder / f"{rank}.out" for rank in range(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder)]
    split = [
        subprocess.Popen(
            [
                *command,
                str(rank),
                str(RANKS),
                (folder / "meeting").as_uri(),
                str(out),
                *available(),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    alone = load_script().answers(model, available())
    for process in split:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    parts = 1 if request.param == "phi3" else RANKS
    return alone, [json.loads(out.read_text()) for out in outs], parts


NAMES = ["", *available(), *(["bytes"] if "snapkv" in available() else [])]


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES, ids=["plain", *NAMES[1:]])
def test_two_processes_answer_as_one(runs, method):
    alone, split, parts = runs
    tokens, held = alone[method]
    assert [found[method][0] for found in split] == [tokens] * RANKS
    assert [found[method][1] * parts for found in split] == [held] * RANKS
