"""Find the code blocks of the documentation, and what can be checked of a command line."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "bash", "console", "sh")
NOTHING: set[str] = set()
PACKAGES = {"nox", "uv", "pip"}
"""Packages of others that the documentation installs by name."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its number on the page, its language and its text."""

    page: str
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Return a name for a test."""
        return f"{self.page}:{self.number}"


def pages() -> list[Path]:
    """List the pages whose code is checked: READMEs, cards and docs."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    return sorted({*found, *ROOT.glob("plugins/*/README.md")})


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in these languages."""
    found = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        parts = FENCE.findall(page.read_text(encoding="utf-8"))
        found += [Block(name, n, language, text) for n, (language, text) in enumerate(parts)]
    return [block for block in found if block.language in languages]


def commands(text: str) -> list[list[str]]:
    """Split a shell block into commands, without comments and settings of variables."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        part: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                part.append(word)
                continue
            while part and re.match(r"^[A-Z_]+=", part[0]):
                part.pop(0)
            if part:
                found.append(part)
            part = []
    return found


def complaint(words: list[str], app: typer.Typer, made: set[str] = NOTHING) -> str | None:
    """Return what is wrong with a command, None if everything it names exists.

    Args:
        made: folders that an earlier command of the documentation makes.
    """
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    program, *rest = words
    if program == "kvdock":
        return _kvdock(rest, app)
    if program == "nox":
        return _nox(rest)
    if program in ("pip", "uv"):
        return _install(rest, made)
    if program == "python":
        return None if (ROOT / rest[0]).is_file() else f"there is no {rest[0]}"
    if program == "pytest":
        return None if all((ROOT / w).exists() for w in rest if "/" in w) else "no such tests"
    if program == "lm_eval":
        # a command of a newer lm-eval, named as an alternative
        return None
    return f"unknown program {program!r}"


def _kvdock(rest: list[str], app: typer.Typer) -> str | None:
    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="kvdock")
    if not rest:
        return "kvdock without a command"
    command = group.get_command(context, rest[0])
    if command is None:
        return f"there is no command kvdock {rest[0]}"
    try:
        # parses and checks, but runs nothing
        command.make_context(rest[0], rest[1:], parent=context)
    except Exception as error:
        # typer brings its own click, or not, depending on its version
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None


def _nox(rest: list[str]) -> str | None:
    text = (ROOT / "noxfile.py").read_text()
    names = set(re.findall(r"^def (\w+)\(session", text, re.MULTILINE))
    names |= set(re.findall(r"name=\"([\w-]+)\"", text))
    names |= {f"tests-{path.parent.name}" for path in ROOT.glob("envs/*/requirements.in")}
    tags = set(re.findall(r"tags=\[\"(\w+)\"\]", text))
    asked = rest[: rest.index("--")] if "--" in rest else rest
    for option, value in itertools.pairwise(asked):
        if option == "-s" and re.sub(r"\(.*\)$", "", value) not in names:
            return f"there is no session {value}"
        if option == "-t" and value not in tags:
            return f"there is no tag {value}"
    return None


def _install(rest: list[str], made: set[str]) -> str | None:
    rest = rest[1:] if rest[:1] == ["pip"] else rest
    if rest[:1] == ["venv"]:
        return None
    if rest[:1] != ["install"]:
        return f"expected pip install, found {' '.join(rest)}"
    projects = {}
    for path in [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]:
        project = tomllib.loads(path.read_text())["project"]
        projects[project["name"]] = set(project.get("optional-dependencies", {}))
    folders = {path: name for name, path in _folders().items()}
    takes_file = False
    for word in rest[1:]:
        if takes_file and not (ROOT / word).is_file():
            return f"there is no file {word}"
        if takes_file or word.startswith("-"):
            takes_file = word in ("-c", "-r")
            continue
        target, _, extras = word.rstrip("]").partition("[")
        if target.removeprefix("./") in made:
            continue
        name = re.split(r"[<>=]", target)[0]
        if "/" in target or target in ("core", "benchmarks"):
            place = (ROOT / target).resolve()
            if place not in folders:
                return f"{target} is no distribution of this repository"
            name = folders[place]
        if name not in projects:
            if name not in PACKAGES:
                return f"there is no package {name}"
            continue
        if missing := set(filter(None, extras.split(","))) - projects[name]:
            return f"{name} has no extra {', '.join(sorted(missing))}"
    return None


def _folders() -> dict[str, Path]:
    paths = [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
    return {tomllib.loads(p.read_text())["project"]["name"]: p.parent.resolve() for p in paths}
