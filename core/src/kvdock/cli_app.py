"""The commands of the core; other packages add theirs to `app` by the hook kvdock_commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from kvdock import __version__
from kvdock.cli_list import print_methods
from kvdock.errors import OptionError
from kvdock.method import Method
from kvdock.options import describe
from kvdock.registry import default_host

app = typer.Typer(
    name="kvdock",
    help="Compress the KV cache and make prefill sparse, with methods that dock as packages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OWN = {"list", "show", "doctor", "new", "--version"}
"""First arguments that need no command of another package."""


def console() -> Console:
    """Return a console for tables, wide enough for them when the output is not a terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=160)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compress the KV cache and make prefill sparse, with methods that dock as packages."""


@app.command("list")
def list_methods() -> None:
    """List the installed methods; one that cannot be loaded is red, with the reason."""
    print_methods()


@app.command()
def show(method: Annotated[str, typer.Argument(help="Id or the paper's name.")]) -> None:
    """Show a method's options, capabilities and paper."""
    record = default_host().load(method)
    out = console()
    out.print(Text(f"{record.name} ({record.id}), {record.kind}"), style="bold")
    if record.summary:
        out.print(Text(record.summary))
    out.print(Text(f"{record.paper.title}, {record.paper.venue}  {record.paper.url}"))
    budget = "none" if record.default_budget is None else f"{record.default_budget} slots"
    out.print(Text(f"Default budget: {budget}"))
    out.print()
    out.print(_options_table(record))
    out.print()
    out.print(_capabilities_table(record))


class _SeveralLengths(TyperCommand):
    """Let one flag take several numbers: `--lengths 8192 32768`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further number, then parse as usual."""
        spread: list[str] = []
        taking = False
        for word in args:
            if taking and word.isdecimal() and spread[-1] != "--lengths":
                spread.append("--lengths")
            taking = word == "--lengths" or (taking and word.isdecimal())
            spread.append(word)
        return super().parse_args(ctx, spread)


@app.command(cls=_SeveralLengths)
def doctor(
    method: Annotated[
        str | None, typer.Argument(help="Also check this method, or methods joined by '+'.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Estimate memory: a local folder or its config.json.")
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option(help="Prompt lengths; 8192 32768 131072 if left out.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="2048 slots, 25% of the prompt, or 1GiB.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; else the config's.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Such as 80GiB; else what is free on the first GPU.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Prompts at once.")] = 1,
    contract: Annotated[
        bool, typer.Option("--contract/--no-contract", help="Run METHOD's contract checks.")
    ] = True,
) -> None:
    """Report versions, devices, backends; of METHOD the contract checks, of --model the memory."""
    # imported here because it is the only command that may import torch
    from kvdock.cli_doctor import examine
    from kvdock.cli_estimate import LENGTHS, Request

    request = None
    if model is not None:
        request = Request(model, lengths or LENGTHS, budget, dtype, memory, batch_size)
    elif lengths or budget or dtype or memory:
        raise OptionError(
            "--lengths, --budget, --dtype and --memory are about an estimate, but there is no"
            " model. Name it: kvdock doctor --model FOLDER"
        )
    healthy = examine(console(), method, request, contract=contract)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Letters and digits, such as my-method.")],
    path: Annotated[
        Path | None, typer.Option(help="The folder to make; ./NAME if left out.")
    ] = None,
) -> None:
    """Make a package with a working method to start from, a copy of the smallest one."""
    from kvdock.scaffold import create

    folder = create(name, path)
    place = str(folder) if folder.is_absolute() else f"./{folder.as_posix()}"
    print(f"Made {place}. Next:\n  pip install -e {shlex.quote(place)}\n  kvdock doctor {name}")


def _options_table(method: Method) -> Table:
    table = _table("option", "default", "allowed", "symbol", "meaning")
    for row in describe(method.options_type()):
        table.add_row(row.name, Text(str(row.default)), row.range, row.symbol, Text(row.help))
    return table


def _capabilities_table(method: Method) -> Table:
    abilities = method.capabilities
    shortest = abilities.shortest_gain
    rows: dict[str, Any] = {
        "acts at": ", ".join(sorted(abilities.phases)),
        "lengths differ per layer": abilities.per_layer_lengths,
        "lengths differ per head": abilities.per_head_lengths,
        "needs queries": abilities.needs_queries,
        "needs probabilities": abilities.needs_probabilities,
        "evicts": abilities.evicts,
        "left padding": abilities.supports_padding,
        "beam search": abilities.supports_beam,
        "backends": ", ".join(abilities.backends) or "any",
        "dtypes": ", ".join(abilities.dtypes),
        "gains from": "any length above the budget" if shortest is None else f"{shortest} tokens",
        "needs a GPU": method.needs.gpu,
        "extras": ", ".join(method.needs.extras) or "none",
    }
    table = _table("capability", "")
    for name, value in rows.items():
        table.add_row(name, {True: "yes", False: "no"}[value] if isinstance(value, bool) else value)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
