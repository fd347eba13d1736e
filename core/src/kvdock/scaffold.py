"""Make the package of a new method: the template is L2Compress under another name."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from kvdock.errors import KVDockError
from kvdock.method import canonical
from kvdock.registry import Host, default_host

SUFFIX = ".template"
"""Ends the name of every packaged file, so that no tool takes the template for code of the core."""

LONGEST = 40
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*")
_OURS = {"bench", "contract", "testing"}
"""Names that this project's own distributions have, or may get."""


class NameTakenError(KVDockError):
    """Report a name or a folder that cannot be given to a new method."""


@dataclass(frozen=True, slots=True)
class Names:
    """The spellings of one method.

    Args:
        id: the method's id. title: the spelling for texts, and the start of class names.
    """

    id: str
    title: str

    @classmethod
    def of(cls, name: str) -> Names:
        """Read what the user typed: `demo-method` → `demomethod` and `DemoMethod`."""
        if len(name) > LONGEST or not _NAME.fullmatch(name):
            raise NameTakenError(
                f"found the name {name[: LONGEST + 1]!r}, expected at most {LONGEST} letters and"
                " digits, words joined by '-' or '_', a letter first. Try: kvdock new my-method"
            )
        id = canonical(name)
        if id.startswith("kvdock"):
            raise NameTakenError(
                f"found the name {name!r}; packages are named kvdock-<id> anyway. Leave the"
                " 'kvdock' out."
            )
        return cls(id, "".join(part[0].upper() + part[1:] for part in re.split("[-_]", name)))

    def apply(self, text: str) -> str:
        """Return a text of the template under this method's name."""
        return text.replace("L2Compress", self.title).replace("l2compress", self.id)


def create(name: str, path: Path | None = None, host: Host | None = None) -> Path:
    """Write the package of a new method and return its folder; nothing is left half-written.

    Args:
        path: the folder to make; ``./NAME`` when None. Its parents are made too.

    Raises ``NameTakenError`` for a name that is malformed or in use, and for a folder that exists.
    """
    names = Names.of(name)
    _check_free(names, host or default_host())
    target = Path(name) if path is None else path
    if os.path.lexists(target):
        raise NameTakenError(
            f"{str(target)!r} exists already and stays as it is. Name another folder: kvdock new"
            f" {name} --path FOLDER"
        )
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the last step is one rename
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{names.id}.") as folder:
            made = Path(folder) / "package"
            _write(_template(), made, names)
            made.rename(target)
    except BaseException as error:
        for parent in missing:
            # what others have put into it meanwhile stays
            with contextlib.suppress(OSError):
                parent.rmdir()
        if not isinstance(error, OSError):
            raise
        raise NameTakenError(
            f"{str(target)!r} cannot be made: {error.strerror or error}. Name a folder that can be"
            f" written: kvdock new {name} --path FOLDER"
        ) from None
    return target


def _check_free(names: Names, host: Host) -> None:
    installed = host.installed()
    if names.id in installed:
        source = ", ".join(host.sources(names.id)) or "this process"
        raise NameTakenError(
            f"a method {names.id!r} is installed already, by {source}. Choose another name than"
            f" {', '.join(sorted(installed))}."
        )
    taken = {canonical(found.name) for found in distributions() if found.name}
    if names.id in _OURS or f"kvdock{names.id}" in taken:
        raise NameTakenError(
            f"the distribution kvdock-{names.id} belongs to something else. Choose another name."
        )


def _template() -> Traversable:
    return files("kvdock").joinpath("template")


def template_files(root: Traversable | None = None, at: str = "") -> dict[str, str]:
    """Return the template's texts by their places in L2Compress's package."""
    found: dict[str, str] = {}
    for entry in (root or _template()).iterdir():
        place = f"{at}{entry.name}"
        if entry.is_dir():
            found |= template_files(entry, f"{place}/")
        elif entry.name.endswith(SUFFIX):
            found[place.removesuffix(SUFFIX)] = entry.read_text("utf-8")
    return found


def _write(root: Traversable, folder: Path, names: Names) -> None:
    folder.mkdir()
    for place, text in template_files(root).items():
        file = folder / PurePosixPath(names.apply(place))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(names.apply(text), "utf-8", newline="\n")
