"""Draw a summary: accuracy and times by length, and accuracy by the memory that is held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvdock_bench.columns import Column
from kvdock_bench.drawing import SOFT, Look, length_axis, looks, make_axes, to_svg
from kvdock_bench.statistics import pareto_front
from kvdock_bench.summary import Cost, Summary
from kvdock_bench.tables import length_name
from kvdock_bench.tasks import OWN_LENGTH

_LENGTH = "prompt length (tokens)"


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled drawing."""

    name: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Costs:
    """A measure drawn by length."""

    name: str
    title: str
    unit: str
    value: Callable[[Cost], float | None]


_COSTS = (
    _Costs("ttft", "Time to first token", "seconds", lambda cost: cost.ttft_s),
    _Costs("ms-per-token", "Time per token", "milliseconds", lambda cost: cost.ms_per_token),
)


def make_plots(summary: Summary) -> list[Plot]:
    """Return the plots for which there are numbers; several budgets get a plot each."""
    styles = looks(summary.board.columns)
    budgets = _by_budget(summary.board.columns)
    plots = [_accuracy(summary, columns, styles, name) for name, columns in budgets.items()]
    plots += [_memory(summary, length, styles) for length in summary.board.lengths]
    plots += [
        _cost(summary, columns, styles, name, measure)
        for measure in _COSTS
        for name, columns in budgets.items()
    ]
    return [plot for plot in plots if plot is not None]


def _by_budget(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """Return the columns to draw together, by budget; those without one are in each."""
    budgets = dict.fromkeys(column.budget for column in columns if column.budget)
    if len(budgets) < 2:
        return {"": list(columns)}
    return {budget: [c for c in columns if c.budget in (None, budget)] for budget in budgets}


def _accuracy(
    summary: Summary, columns: Sequence[Column], styles: dict[str, Look], budget: str
) -> Plot | None:
    lengths = _fitted(summary)
    series = {}
    for column in columns:
        scores = [(n, summary.scores[column.key, n, summary.headline]) for n in lengths]
        points = [(n, s.value, s.error or 0) for n, s in scores if s.comparable is not None]
        if points:
            series[column.key] = points
    if not series:
        return None
    title = _title("Accuracy by prompt length", budget)
    figure, axes, width = make_axes([styles[k]["label"] for k in series], _LENGTH, "accuracy (%)")
    for key, points in series.items():
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=error, capsize=3, elinewidth=1, **styles[key])
    length_axis(axes, _lengths(series))
    axes.set_ylim(-3, 103)
    return Plot(_name("accuracy", budget), title, to_svg(figure, title, width))


def _memory(summary: Summary, length: int, styles: dict[str, Look]) -> Plot | None:
    points = []
    for column in summary.board.columns:
        score = summary.scores[column.key, length, summary.headline].comparable
        held = summary.costs[column.key, length].kv_bytes
        if score is not None and held is not None:
            points.append((held / 2**20, score, column.key))
    if not points:
        return None
    title = f"Accuracy by KV memory at {length_name(length)}"
    labels = [styles[key]["label"] for _, _, key in points]
    figure, axes, width = make_axes(labels, "KV cache held per prompt (MiB)", "accuracy (%)")
    front = [points[i] for i in pareto_front([(x, y) for x, y, _ in points])]
    axes.plot([p[0] for p in front], [p[1] for p in front], color=SOFT, linewidth=1, zorder=1)
    for point in points:
        look = {**styles[point[2]], "linestyle": "none", "markersize": 9}
        axes.plot(*([value] for value in point[:2]), alpha=1 if point in front else 0.3, **look)
    axes.set_xlim(left=0, right=1.12 * max(x for x, _, _ in points) or 1)
    axes.set_ylim(-3, 103)
    note = "The line joins the Pareto front; points that another beats are faded."
    return Plot(f"pareto-{length}", title, to_svg(figure, title, width), note)


def _cost(
    summary: Summary,
    columns: Sequence[Column],
    styles: dict[str, Look],
    budget: str,
    measure: _Costs,
) -> Plot | None:
    series = {}
    for column in columns:
        costs = [(n, measure.value(summary.costs[column.key, n])) for n in _fitted(summary)]
        points = [(n, y) for n, y in costs if y is not None]
        if points:
            series[column.key] = points
    if not series:
        return None
    title = _title(f"{measure.title} by prompt length", budget)
    labels = [styles[key]["label"] for key in series]
    figure, axes, width = make_axes(labels, _LENGTH, measure.unit)
    for key, points in series.items():
        axes.plot(*zip(*points, strict=True), **styles[key])
    length_axis(axes, _lengths(series))
    axes.set_ylim(0, 1.08 * max(y for points in series.values() for _, y in points) or 1)
    return Plot(_name(measure.name, budget), title, to_svg(figure, title, width))


def _fitted(summary: Summary) -> list[int]:
    """Return the lengths that have a place on an axis."""
    return [length for length in summary.board.lengths if length != OWN_LENGTH]


def _lengths(series: Mapping[str, Sequence[tuple[Any, ...]]]) -> list[int]:
    return sorted({int(point[0]) for points in series.values() for point in points})


def _title(title: str, budget: str) -> str:
    return f"{title}, budget {budget}" if budget else title


def _name(name: str, budget: str) -> str:
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in budget)
    return f"{name}-{plain}" if plain else name
