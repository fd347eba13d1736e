"""The memory estimate of `kvdock doctor --model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvdock.budget import Budget
from kvdock.errors import KVDockError, OptionError, UnsupportedError
from kvdock.registry import default_host

if TYPE_CHECKING:
    from kvdock.compose import Composition
    from kvdock.footprint import Footprint

LENGTHS = (8192, 32768, 131072)
HUGE = 2**40


@dataclass(frozen=True, slots=True)
class Request:
    """What to estimate; texts as the user gave them.

    Args:
        model: a local folder or config.json. lengths: tokens of a prompt.
        memory: "80GiB"; None takes what the first GPU has free.
    """

    model: str
    lengths: Sequence[int] = LENGTHS
    budget: str | None = None
    dtype: str | None = None
    memory: str | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        for name, numbers in (("lengths", self.lengths), ("batch_size", (self.rows,))):
            wrong = [number for number in numbers if not 1 <= number <= HUGE]
            if wrong:
                raise OptionError(
                    f"--{name} is {wrong[0]}, expected whole numbers from 1, such as --{name} 8."
                )
        Budget.parse(self.budget)
        self.memory_bytes()

    def memory_bytes(self) -> int | None:
        """Return the bytes asked about, None where they have to be read from a GPU."""
        if self.memory is None:
            return None
        size = Budget.parse(self.memory)
        if size.kind != "bytes":
            raise OptionError(f"--memory is {self.memory!r}, expected a size such as 80GiB.")
        return int(size.amount)


def print_estimate(out: Console, request: Request, method: str | None) -> None:
    """Print weights, cache and longest prompt of one method, or of all installed ones.

    Raises ``KVDockError`` for a path that is no model, weights or a budget beyond the memory, and a
    method that does not fit the model.
    """
    import torch

    from kvdock.estimate import Estimate
    from kvdock.footprint import read_model

    model = read_model(request.model, request.dtype)
    memory, place = request.memory_bytes(), f"{request.memory} (--memory)"
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.mem_get_info(0)[0]
        place = f"{size(memory)} free on {torch.cuda.get_device_name(0)}"
    if memory is not None:
        _check_fits(request, model.weights, memory)
    dtype = str(model.dtype).removeprefix("torch.")
    out.print(Text(f"Memory of {model.name}, {dtype}, batch of {request.rows}"), style="bold")
    out.print(Text(f"  weights {size(model.weights)}"))
    out.print(Text(f"  memory {place if memory is not None else 'unknown; name it by --memory'}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  keys and values after a prompt of", overflow="fold")
    for tokens in request.lengths:
        table.add_column(f"{tokens} tokens", justify="right")
    table.add_column("longest prompt", justify="right")
    plain = Estimate(model, None, request.rows)
    full = [plain.cache(tokens) for tokens in request.lengths]
    table.add_row("  full cache", *map(size, full), _longest(plain.longest, memory, model.longest))
    for name in [method] if method else default_host().available():
        try:
            estimate = Estimate(model, _composed(model, name, request, method), request.rows)
            held = [estimate.cache(tokens) for tokens in request.lengths]
        except KVDockError as error:
            if method:
                raise
            table.add_row(f"  {name}", Text(str(error), style="dim"))
            continue
        cells = [f"{size(h)} ({h / f:.1%})" for h, f in zip(held, full, strict=True)]
        table.add_row(f"  {name}", *cells, _longest(estimate.longest, memory, model.longest))
    out.print(table)
    if model.longest and max(request.lengths) > model.longest:
        out.print(Text(f"  the model is made for {model.longest} tokens"), style="dim")


def _check_fits(request: Request, weights: int, memory: int) -> None:
    if weights >= memory:
        raise UnsupportedError(
            f"the weights take {size(weights)}, but there are {size(memory)} of memory. Use a"
            " smaller model or dtype, or name a larger memory by --memory."
        )
    budget = Budget.parse(request.budget)
    if budget is not None and budget.kind == "bytes" and budget.amount > memory - weights:
        raise UnsupportedError(
            f"budget {budget}: the cache may take at most {size(memory - weights)}, which"
            f" {size(weights)} of weights leave of {size(memory)}. Lower --budget, or raise"
            " --memory."
        )


def _composed(model: Footprint, name: str, request: Request, method: str | None) -> Composition:
    """Return the method ready for this model; one that takes no budget gets none."""
    from kvdock.compose import compose
    from kvdock.estimate import bind

    records = [default_host().load(part.strip()) for part in name.split("+")]
    takes = any(record.default_budget for record in records)
    budget = request.budget if takes or method else None
    composition = compose(default_host(), name, budget, {})
    bind(model, composition)
    return composition


def _longest(search: Callable[[int], int], memory: int | None, limit: int | None) -> str:
    if memory is None:
        return "-"
    found = search(memory)
    if not found:
        return "none fits"
    return f"{found} (the model's)" if found == limit else f"about {found}"


def size(count: int) -> str:
    """Write bytes in the largest unit that leaves a whole part."""
    number, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.4g} {units[0]}"
