"""`kvdock doctor --model` would have told the memory that GPU runs measured."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvdock import available
from kvdock.compose import compose
from kvdock.estimate import Estimate
from kvdock.footprint import of_model
from kvdock.registry import default_host

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    run
    for path in sorted((ROOT / "benchmarks" / "results").glob("long-prompt-*/long_prompt*.json"))
    for run in json.loads(path.read_text())["runs"]
    if run["system"] in {"full", *available()} and "peak_gib" in run and "kv_gib" in run
]


@pytest.fixture(scope="module")
def llama():
    """Return Llama-3.1-8B, as its config describes it."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.device("meta"):
        return of_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


def test_measured_runs_exist():
    assert len(RUNS) >= 2


@pytest.mark.parametrize(
    "run", RUNS, ids=lambda run: f"{run['system']}-{run['tokens']}-{run['kv_gib']}"
)
def test_peak_and_cache(run, llama):
    system = run["system"]
    full = system == "full"
    composition = None if full else compose(default_host(), system, run["budget"], {})
    estimate = Estimate(llama, composition, run["batch"])
    assert estimate.peak(run["tokens"]) / 2**30 == pytest.approx(run["peak_gib"], rel=0.05)
    # measured after 49 and 65 more tokens, and room for up to 256 more
    more = 32 * 2 * 8 * 128 * 2 * (256 + 65) * run["batch"] / 2**30
    assert 0 <= run["kv_gib"] - estimate.cache(run["tokens"]) / 2**30 < more
