"""What each method was measured to save and to cost, as cells of the table of methods."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "scripts"))

import stored  # noqa: E402  (a program's folder, not a package)

WORDS = {
    "en": {
        "unchanged": "unchanged",
        "blocks": "{share} of the blocks",
        "none": "not measured",
    },
    "zh": {
        "unchanged": "不变",
        "blocks": "保留 {share} 的块",
        "none": "未测",
    },
}


def cells(id: str, language: str = "en") -> tuple[str, str]:
    """Return the cache that is held and the time to first token, linked to their runs.

    A method without a stored run says so: nothing is estimated.
    """
    words = WORDS[language]
    runs = stored.long_prompts()
    if id in runs:
        run = runs[id]
        times = run.kv_full_gib / run.kv_gib
        ratio = f"{times:.0f}" if times >= 10 else f"{times:.1f}"
        memory = f"{run.kv_full_gib:.1f} → {run.kv_gib:.2f} GiB ({ratio}×)"
        return _link(memory, "long-prompt-h100"), _link(f"{run.overhead:+.1%}", "long-prompt-h100")
    if id in ("flexprefill", "xattention"):
        detail = words["blocks"].format(share="10 %")
        time = f"{stored.sparse_prompt(id):+.0%} ({detail})"
        return words["unchanged"], _link(time, "sparse-prefill-h100")
    return words["none"], words["none"]


def _link(text: str, folder: str) -> str:
    text = text.replace("%", " %").replace("  %", " %").replace("-", "−")
    return f"[{text}](benchmarks/results/{folder}/README.md)"
