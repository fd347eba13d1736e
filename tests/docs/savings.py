"""What each method was measured to save, read from the stored results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def saving(id: str) -> str:
    """Return one phrase for the table of methods, linked to the run it comes from."""
    if id == "kivi":
        folder, name = "storage-h100", "kivi_capacity.json"
        rows = _read(folder, name)["capacity"]
        ratio = rows["full"]["row_bytes"] / rows["kivi-2"]["row_bytes"]
        text = f"cache {ratio:.1f} times smaller at 32K (2 bits)"
    elif id == "think":
        folder = "storage-h100"
        times = _read(folder, "think_decode.json")["times"]
        read = {row["what"]: row["bytes"] for row in times if row["slots"] == 131_072}
        less = 1 - read["think 0.5"] / read["sdpa enable_gqa"]
        text = f"cache {less:.0%} smaller (ratio 0.5)"
    elif id in ("flexprefill", "xattention"):
        folder = "sparse-prefill-h100"
        rows = _read(folder, "ttft.json")["sections"]["ttft"]
        mine = [row for row in rows if row["system"].startswith(id) and row["tokens"] == 131_072]
        best = max(mine, key=lambda row: row["speed_up_over_fastest_dense"])
        share = best["system"].rpartition(" ")[2]
        text = f"{best['speed_up_over_fastest_dense']:.1f} times faster to the first token at 128K"
        text += f" ({share} of the blocks)"
    else:
        folder = "long-prompt-h100"
        rows = {row["system"]: row["kv_gib"] for row in _read(folder, "long_prompt.json")["runs"]}
        text = f"cache {rows['full'] / rows[id]:.0f} times smaller at 128K (2048 slots)"
    return f"[{text}](benchmarks/results/{folder}/README.md)"


@cache
def _read(folder: str, name: str) -> Any:
    return json.loads((RESULTS / folder / name).read_text())
