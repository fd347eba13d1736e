"""The hooks a plugin can implement; all run at set-up, never per layer or token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from kvdock.method import Method
    from kvdock.options import Options

PROJECT = "kvdock"
SPEC_VERSION = 1
"""Rises when a plugin written for the previous number may no longer work."""

ENTRY_POINT_GROUP = "kvdock.methods"
"""Entry points of methods: the name is the method's id, the value the plugin's top module."""

COMMAND_GROUP = "kvdock.commands"
"""Entry points of packages that implement `kvdock_commands`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvdock_methods() -> Iterable[Method]:  # type: ignore[empty-body]
    """Return the records of the methods this plugin brings.

    Implemented in the plugin's top module, which imports neither torch nor a kernel library.
    """


@hookspec(historic=True)
def kvdock_configure(settings: Mapping[str, Any]) -> None:
    """Receive the host's settings; a plugin that is registered later receives them too."""


@hookspec(firstresult=True)
def kvdock_select_kernel(op: str, device: str, dtype: str) -> str | None:
    """Return the name of the kernel backend for an operation, or None to leave it to others.

    `attach` asks for "prefill" or "sparse-prefill" unless its user named a backend; when nobody
    answers, the core chooses.
    """


@hookspec(firstresult=True)
def kvdock_build_policy(method: Method, options: Options) -> Any:
    """Return the policy for a method and its checked options, or None to leave it to others.

    The core answers last, by calling the method's factory; a wrapper can adapt the result.
    """


@hookspec
def kvdock_commands(app: Any) -> None:
    """Add commands to the command line: `app` is the `typer.Typer` of `kvdock`."""
