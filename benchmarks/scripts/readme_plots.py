"""Draw the README's plots from the stored results.

    python benchmarks/scripts/readme_plots.py

Nothing is measured here; `stored.py` names the files that are read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from stored import light_scores, long_prompts, step_ms

from kvdock_bench.drawing import COLOURS, INK, LINE, SOFT

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
NAMES = {
    "streamingllm": "StreamingLLM",
    "snapkv": "SnapKV",
    "snapkv:kernel=21": "SnapKV, kernel=21",
    "pyramidkv": "PyramidKV",
    "cakekv": "CakeKV",
    "cam": "CaM",
    "h2o": "H2O",
    "l2compress": "L2Compress",
    "random": "random eviction",
}
STYLE = {
    "svg.fonttype": "none",
    # equal content gives equal files
    "svg.hashsalt": "kvdock",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_long_prompts() -> Figure:
    """Draw cache, peak memory and added time at 131 072 tokens, and a captured decode step."""
    runs, steps = long_prompts(), step_ms()
    names = {**NAMES, "kivi": "KIVI, 4 bits", "think": "ThinK, ratio 0.375"}
    order = [id for id in names if id in runs and id in steps][::-1]
    shown = [names[id] for id in order]
    full = runs["snapkv"]
    panels: tuple[tuple[str, list[float], float | None, str], ...] = (
        ("KV cache, GiB", [runs[id].kv_gib for id in order], full.kv_full_gib, ".2f"),
        ("peak memory, GiB", [runs[id].peak_gib for id in order], full.peak_full_gib, ".1f"),
        ("time to first token, added %", [100 * runs[id].overhead for id in order], None, ".1f"),
        ("captured step at 32K, ms", [steps[id] for id in order], None, ".1f"),
    )
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    for place, (title, values, reference, form) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        if reference is not None:
            rows, values = [*shown, "full cache"], [*values, reference]
        else:
            rows, values = [*shown, ""], [*values, 0]
        colours = [COLOURS[0]] * len(order) + [SOFT]
        bars = axes.barh(range(len(rows)), values, color=colours, height=0.7)
        labels = [
            format(value, form) if name else "" for name, value in zip(rows, values, strict=True)
        ]
        axes.bar_label(bars, labels, padding=3)
        axes.set_yticks(range(len(rows)), rows if place == 0 else [""] * len(rows))
        least, most = min(0, *values), max(values)
        axes.set_xlim(least - 0.3 * (most - least) * (least < 0), most + 0.25 * (most - least))
        axes.axvline(0, color=SOFT, linewidth=1)
        axes.set_title(title, loc="left")
        _plain(axes, "x")
    return figure


def draw_accuracy() -> Figure:
    """Draw RULER's light tasks by budget, with the full cache as a line."""
    rows = light_scores()
    budgets = sorted({budget for _, budget in rows if budget is not None})
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    full = rows["full", None]["mean"]
    axes.axhline(full, color=INK, linestyle="--", linewidth=1.4, label=f"full cache ({full:.1f})")
    for place, (id, name) in enumerate(NAMES.items()):
        points = [rows[id, budget] for budget in budgets]
        axes.errorbar(
            range(len(budgets)),
            [row["mean"] for row in points],
            yerr=[row["error"] for row in points],
            color=COLOURS[place],
            marker="osD^vPX*<"[place],
            linewidth=1.5,
            capsize=3,
            label=f"{name} ({points[-1]['mean']:.1f})",
        )
    axes.set_xticks(range(len(budgets)), [f"{budget} slots" for budget in budgets])
    axes.set_ylim(-3, 100)
    axes.set_ylabel("accuracy (%)")
    _plain(axes, "y")
    figure.legend(loc="outside right center", frameon=False, title=f"at {budgets[-1]} slots, %")
    return figure


DRAWINGS = {"long-prompt.svg": draw_long_prompts, "accuracy.svg": draw_accuracy}


def draw(name: str, folder: Path) -> Path:
    """Write one of the plots into a folder and return its path."""
    path = folder / name
    with matplotlib.rc_context(STYLE):
        DRAWINGS[name]().savefig(path, format="svg", facecolor="white", metadata={"Date": None})
    # lines end in blanks otherwise, which a repository does not want
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    return path


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write every plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=IMAGES)
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    for name in DRAWINGS:
        print(draw(name, folder))


if __name__ == "__main__":
    main()
