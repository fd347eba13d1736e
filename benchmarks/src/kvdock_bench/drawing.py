"""How plots look: drawn as SVG that a page can restyle and a phone can shrink."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from kvdock_bench.columns import Column
from kvdock_bench.escaping import drawn, visible
from kvdock_bench.tables import length_name

# inside a page the ink follows the text, and so suits a dark page too
INK, LINE, SOFT = "#1f2430", "#e4e7ee", "#8a93a6"
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c99700", "#56b4e9", "#8c5a2b", "#7a5195"),
    *("#e4572e", "#17a398", "#6a8d00", "#b5179e", "#4361ee", "#7f7f7f"),
)
MARKERS = "osD^vPX*<>hpd8"
Look = dict[str, Any]
_WIDTH, _HEIGHT, _ROW = 4.9, 3.3, 0.235
_LEGEND_CHARACTERS = 56
_LABEL_CHARACTERS = 48
_STYLE = {
    "svg.fonttype": "none",
    # equal content gives equal files
    "svg.hashsalt": "kvdock",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def looks(columns: Sequence[Column]) -> dict[str, Look]:
    """Return by column key how it is drawn: a colour per method, full caches in ink and dashed.

    Columns that differ in their budget or their run only share colour and differ in the marker.
    """
    families: dict[tuple[Any, ...], int] = {}
    places: list[tuple[Any, ...]] = []
    found = {}
    for column in columns:
        family = _family(column)
        step = families[family] = families.get(family, -1) + 1
        if not column.is_full and family not in places:
            places.append(family)
        place = -1 if column.is_full else places.index(family)
        found[column.key] = {
            # the options of a grid's variant may be longer than a line
            "label": textwrap.fill(drawn(column.label), _LABEL_CHARACTERS),
            "color": INK if column.is_full else COLOURS[place % len(COLOURS)],
            "marker": MARKERS[(place + 1 + step) % len(MARKERS)],
            "linestyle": "--" if column.is_full else "-",
            "linewidth": 1.6,
            "markersize": 6,
        }
    return found


def make_axes(labels: Sequence[str], x_label: str, y_label: str) -> tuple[Figure, Any, int]:
    """Return a figure, its axes, and the columns of a legend of these labels above them."""
    lines = [line for label in labels for line in label.split("\n")]
    widest = max(map(len, lines), default=0)
    # what fits side by side above the axes; a mark is as wide as six characters
    columns = max(1, min(3, _LEGEND_CHARACTERS // (6 + widest), len(labels)))
    height = _HEIGHT + _ROW * -(-len(lines) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes, columns


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Space lengths by their logarithm and name each."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [length_name(length) for length in lengths])
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)


def to_svg(figure: Figure, title: str, legend_columns: int) -> str:
    """Return the drawing as one <svg> element that has a legend and tells its title."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *(handles, labels),
        loc="outside upper left",
        ncols=legend_columns,
        frameon=False,
        labelcolor=INK,
    )
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # the reader's fonts draw the labels, ours only measure them
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    content = text.getvalue()
    # inside a page neither the XML declaration nor the document type has a place
    content = content[content.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', content))
    content = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", content)
    content = content.replace(INK, "currentColor").replace(LINE, "var(--line, #e4e7ee)")
    label = escape(visible(title), quote=True)
    return content.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _family(column: Column) -> tuple[Any, ...]:
    options = {name: dict(values) for name, values in column.method.options.items()}
    return column.is_full, column.method.server, column.method.ids, repr(options)
