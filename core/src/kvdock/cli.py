"""The command line (filled in the next step)."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
