"""Draw the summary as SVG, readable when a phone shrinks it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from kvdock_bench.statistics import pareto_front
from kvdock_bench.summary import Cost, Summary
from kvdock_bench.tables import length_name

# the full cache is ink; the others are distinct also for colour-blind readers
INK = "#1f2430"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c5a2b", "#7a5195")
MARKERS = "osD^vPX*"
_STYLE = {
    "svg.fonttype": "none",
    # equal content gives equal files
    "svg.hashsalt": "kvdock",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": "#8a93a6",
    "axes.labelcolor": INK,
    "xtick.color": "#4a5163",
    "ytick.color": "#4a5163",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled drawing."""

    name: str
    title: str
    svg: str
    note: str = ""


def make_plots(summary: Summary) -> list[Plot]:
    """Return the plots for which there are numbers."""
    plots = [_accuracy(summary)]
    plots += [_memory(summary, length) for length in summary.lengths]
    plots.append(_cost(summary, "ttft", "Time to first token", "seconds", lambda cost: cost.ttft_s))
    plots.append(
        _cost(summary, "ms-per-token", "Time per token", "milliseconds", lambda c: c.ms_per_token)
    )
    return [plot for plot in plots if plot is not None]


def _accuracy(summary: Summary) -> Plot | None:
    series = []
    for method in summary.methods:
        scores = [(n, summary.scores[method.method_id, n]) for n in summary.lengths]
        series.append([(n, s.value, s.error) for n, s in scores if s.value is not None])
    if not any(series):
        return None
    figure, axes = _axes("prompt length (tokens)", "accuracy (%)")
    for place, points in enumerate(series):
        x, y, error = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            x, y, yerr=[e or 0 for e in error], capsize=3, elinewidth=1, **_look(summary, place)
        )
    _length_axis(axes, summary.lengths)
    axes.set_ylim(-3, 103)
    _legend(figure)
    return Plot("accuracy", "Accuracy by prompt length", _svg(figure))


def _memory(summary: Summary, length: int) -> Plot | None:
    points = []
    for place, method in enumerate(summary.methods):
        score = summary.scores[method.method_id, length].value
        held = summary.costs[method.method_id, length].kv_bytes
        if score is not None and held is not None:
            points.append((held / 2**20, score, place))
    if not points:
        return None
    figure, axes = _axes("KV cache held per prompt (MiB)", "accuracy (%)")
    front = [points[i] for i in pareto_front([(x, y) for x, y, _ in points])]
    axes.plot([p[0] for p in front], [p[1] for p in front], color="#8a93a6", linewidth=1, zorder=1)
    for x, y, place in points:
        look = _look(summary, place)
        faded = 1.0 if (x, y, place) in front else 0.35
        axes.plot([x], [y], **{**look, "linestyle": "none", "markersize": 9}, alpha=faded)
    axes.set_xlim(left=0, right=1.12 * max(x for x, _, _ in points))
    axes.set_ylim(-3, 103)
    _legend(figure)
    return Plot(
        f"pareto-{length}",
        f"Accuracy by KV memory at {length_name(length)}",
        _svg(figure),
        "The line joins the Pareto front; points that another beats are faded.",
    )


def _cost(
    summary: Summary, name: str, title: str, unit: str, value: Callable[[Cost], float | None]
) -> Plot | None:
    figure, axes = _axes("prompt length (tokens)", unit)
    drawn = False
    for place, method in enumerate(summary.methods):
        costs = [(n, value(summary.costs[method.method_id, n])) for n in summary.lengths]
        points = [(n, y) for n, y in costs if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **_look(summary, place))
            drawn = True
    if not drawn:
        return None
    _length_axis(axes, summary.lengths)
    axes.set_ylim(bottom=0)
    _legend(figure)
    return Plot(name, f"{title} by prompt length", _svg(figure))


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.9, 3.8), layout="constrained")
        axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e4e7ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _look(summary: Summary, place: int) -> dict[str, Any]:
    full = place == 0
    return {
        "label": summary.methods[place].label,
        "color": INK if full else COLOURS[(place - 1) % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "--" if full else "-",
        "linewidth": 1.6,
        "markersize": 6,
    }


def _length_axis(axes: Any, lengths: tuple[int, ...]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [length_name(length) for length in lengths])
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # what fits side by side above the axes
    columns = max(1, min(3, 56 // (6 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    content = text.getvalue()
    # inside a page neither the XML declaration nor the document type has a place
    return content[content.index("<svg") :]
