"""Write the README's table of methods from the plugins' own records."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

from kvdock.method import Method

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- methods: begin .*?-->\n).*?(<!-- methods: end -->)", re.DOTALL)


def plugin_ids() -> list[str]:
    """List the plugins' directories."""
    return sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))


def row(id: str) -> str:
    """Return a plugin's row; its top module imports without torch."""
    module = importlib.import_module(f"kvdock_{id}")
    method: Method = module.kvdock_methods()[0]
    with (ROOT / "plugins" / id / "pyproject.toml").open("rb") as file:
        environment = tomllib.load(file)["tool"]["kvdock"]["environment"]
    cells = (
        f"[{method.name}](plugins/{id}/README.md)",
        method.kind,
        method.summary,
        f"[{method.paper.venue}]({method.paper.url})",
        environment,
        f"`kvdock-{id}`",
    )
    return "| " + " | ".join(cells) + " |"


def table(ids: list[str]) -> str:
    """Return the whole table."""
    head = "| method | kind | what it does | paper | environment | package |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, ids)])


def main() -> None:
    """Replace the table in README.md."""
    readme = ROOT / "README.md"
    text = BLOCK.sub(
        lambda found: f"{found[1]}{table(plugin_ids())}\n{found[2]}", readme.read_text()
    )
    readme.write_text(text)


if __name__ == "__main__":
    sys.path += [str(path) for path in ROOT.glob("plugins/*/src")]
    main()
