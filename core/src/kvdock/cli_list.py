"""The table of `kvdock list`, without typer and rich: their import would triple its time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvdock.registry import Host, default_host

HEADER = ("id", "name", "kind", "package", "paper")
BOLD, RED, PLAIN = "\033[1m", "\033[31m", "\033[0m"


def print_methods(host: Host | None = None) -> None:
    """Print the installed methods; one that cannot be loaded is red, with the reason."""
    host = host or default_host()
    methods, failed = host.load_all()
    if not methods and not failed:
        print("No method is installed. Install one, for example: pip install kvdock-snapkv")
        return
    rows: list[Sequence[str]] = [HEADER]
    for method in methods:
        package = ", ".join(host.sources(method.id)) or "this process"
        paper = f"{method.paper.title}, {method.paper.venue}"
        rows.append((method.id, method.name, method.kind, package, paper))
    for id, reason in failed.items():
        rows.append((id, "", "cannot be loaded", ", ".join(host.sources(id)), reason))
    colours = [BOLD, *[""] * len(methods), *[RED] * len(failed)]
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line, colour in zip(_aligned(rows), colours, strict=True):
        print(f"{colour}{line}{PLAIN}" if colour and coloured else line)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    # the last column is ragged and may run to any length
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for *cells, last in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, last]).rstrip())
    return lines
