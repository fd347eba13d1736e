"""Show what a run would do and what memory it would need."""

from __future__ import annotations

from rich.console import Console

from kvdock import Budget
from kvdock_bench.plan import Plan, estimate_memory
from kvdock_bench.shape import KVShape
from kvdock_bench.tables import length_name, size


def show_plan(console: Console, plan: Plan, shape: KVShape | None, dtype: str) -> None:
    """Print cells, samples, and the estimated KV cache of one prompt by length and method."""
    config = plan.config
    lines = [
        f"Plan: {len(plan.cells)} cells, {plan.n_samples} answers, "
        f"{config.num_samples} per cell; {dtype}, batch size {config.batch_size}.",
        f"Tasks: {', '.join(config.task_names)}",
        "Methods:",
    ]
    for method in plan.methods:
        pairs = [pair for values in method.options.values() for pair in values.items()]
        options = ", ".join(f"{name}={value}" for name, value in pairs)
        parts = [method.label, f"budget {method.budget}" if method.budget else "", options]
        lines.append("  " + "; ".join(part for part in parts if part))
    if shape is not None:
        lines.append("Estimated KV cache of one prompt:")
        item = 4 if dtype == "float32" else 2
        for length in config.length:
            memory = estimate_memory(plan, shape, item, length)
            held = ", ".join(
                f"{label} {'not known before' if count is None else size(count)}"
                for label, count in memory.compressed.items()
            )
            lines.append(f"  {length_name(length)}: {held}")
    lines += budget_warnings(plan)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def budget_warnings(plan: Plan) -> list[str]:
    """Return a line for each method whose budget leaves every prompt as it is."""
    longest = max(plan.config.length)
    return [
        f"Note: {method.label} keeps {method.budget}, no less than the longest prompt ({longest}): "
        "it compresses nothing. Choose less with --budget."
        for method in plan.methods
        if method.budget is not None
        and (budget := Budget.parse(method.budget)).kind == "tokens"
        and budget.amount >= longest
    ]
