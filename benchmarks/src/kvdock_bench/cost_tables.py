"""Lay a summary's times and memory out as tables."""

from __future__ import annotations

from collections.abc import Callable

from kvdock_bench.summary import Cost, Summary
from kvdock_bench.tables import Table, length_name, size


def cost_tables(summary: Summary) -> list[Table]:
    """Return one table per measure, rows by length."""
    measures: dict[str, Callable[[Cost], str]] = {
        "Perplexity": lambda cost: _number(cost.perplexity, "{:.3f}"),
        "Time to first token (s)": lambda cost: _number(cost.ttft_s, "{:.3f}"),
        "Time per token (ms)": lambda cost: _number(cost.ms_per_token, "{:.1f}"),
        "Peak memory allocated on the device": lambda cost: size(cost.peak_bytes),
        "KV cache held after prefill, per prompt": lambda cost: size(cost.kv_bytes),
        "KV cache held, share of full": lambda cost: _number(cost.kv_ratio, "{:.1%}"),
        "Prompt length (tokens, mean)": lambda cost: _number(cost.prompt_tokens, "{:.0f}"),
    }
    return [_table(summary, title, cell) for title, cell in measures.items()]


def _table(summary: Summary, title: str, cell: Callable[[Cost], str]) -> Table:
    board = summary.board
    rows = [
        [
            length_name(length),
            *(cell(summary.costs[column.key, length]) for column in board.columns),
        ]
        for length in board.lengths
    ]
    return Table(title, ["Length", *(column.label for column in board.columns)], rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
