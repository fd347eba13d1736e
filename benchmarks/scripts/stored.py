"""Read the numbers that the documentation quotes from the stored results; no torch needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """One method on one prompt of 131 072 tokens, beside the plain model of the same run."""

    kv_gib: float
    kv_full_gib: float
    peak_gib: float
    peak_full_gib: float
    overhead: float
    """Time to first token over the plain model's, as a share."""


def long_prompts() -> dict[str, LongPrompt]:
    """Return the newest run of every method; a file later in the alphabet is a later one."""
    found = {}
    for path in sorted((RESULTS / "long-prompt-h100").glob("long_prompt*.json")):
        runs = {run["system"]: run for run in _read(path)["runs"] if run["tokens"] == TOKENS}
        full = runs.pop("full")
        for system, run in runs.items():
            found[system] = LongPrompt(
                kv_gib=run["kv_gib"],
                kv_full_gib=full["kv_gib"],
                peak_gib=run["peak_gib"],
                peak_full_gib=full["peak_gib"],
                overhead=run["ttft_ms"] / full["ttft_ms"] - 1,
            )
    return found


def step_ms() -> dict[str, float]:
    """Return the captured decode step of every method after 32 768 tokens, one row, in ms."""
    runs = _read(RESULTS / "decode-graph-h100" / "speed_1.json")["speed"]
    return {run["system"]: run["ms_per_token"] for run in runs if run["graph"] == "auto"}


def row_gib(system: str) -> float:
    """Return the cache of one row of 32 768 tokens: "full", "kivi-4" or "kivi-2"."""
    rows = _read(RESULTS / "storage-h100" / "kivi_capacity.json")["capacity"]
    return float(rows[system]["row_bytes"] / 2**30)


def think_saving(ratio: str) -> float:
    """Return the share of a layer's cache that ThinK does not hold at 131 072 tokens."""
    times = _read(RESULTS / "storage-h100" / "think_decode.json")["times"]
    held = {row["what"]: row["bytes"] for row in times if row["slots"] == TOKENS}
    return float(1 - held[f"think {ratio}"] / held["sdpa enable_gqa"])


def sparse_prompt(method: str, density: str = "10%") -> float:
    """Return the time to first token over the fastest dense attention's, as a share."""
    rows = _read(RESULTS / "sparse-prefill-h100" / "ttft_128k.json")["sections"]["ttft"]
    rows = [row for row in rows if row["tokens"] == TOKENS]
    dense = min(row["ttft_ms"] for row in rows if row["system"].startswith("dense"))
    mine = [
        row["ttft_ms"]
        for row in rows
        if row["system"].startswith(method) and row["system"].endswith(density)
    ]
    return float(min(mine) / dense - 1)


def light_scores() -> dict[tuple[str, int | None], dict[str, Any]]:
    """Return RULER's light tasks on SmolLM2-135M by method and budget in slots, in percent."""
    rows = _read(RESULTS / "ruler-light-smollm2-h100" / "summary.json")["rows"]
    return {(row["method"], int(row["budget"]) if row["budget"] else None): row for row in rows}


@cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text())
