"""What the scripts of this folder share: method specifications and a record's environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from kvdock_bench.metadata import (
    describe_git,
    describe_hardware,
    describe_software,
    environment,
)


def parse_spec(spec: str) -> dict[str, Any]:
    """Return the arguments of `kvdock.attach` from "kivi:bits=4,group_size=32"; budget is one."""
    methods, _, rest = spec.partition(":")
    arguments: dict[str, Any] = {"methods": methods}
    for part in filter(None, rest.split(",")):
        name, equals, text = part.partition("=")
        if not equals:
            raise SystemExit(f"{spec!r}: {part!r} is not option=value, as in kivi:bits=4")
        try:
            arguments[name.strip()] = json.loads(text)
        except ValueError:
            arguments[name.strip()] = text
    return arguments


def describe(script: str, methods: list[str], device: torch.device) -> dict[str, Any]:
    """Return command, commit, versions and hardware; of paths only the last part."""
    shown = [Path(part).name if "/" in part else part for part in sys.argv[1:]]
    ids = sorted({id for spec in methods for id in spec.partition(":")[0].split("+")})
    git = describe_git()
    return {
        "command": " ".join(["python", f"benchmarks/scripts/{script}", *shown]),
        "commit": os.environ.get("KVDOCK_COMMIT") or (git["sha"] if git else None),
        "software": describe_software(ids),
        "hardware": describe_hardware([device]),
        "variables": environment(),
    }


def write(target: str | None, record: dict[str, Any]) -> None:
    """Write a record as JSON where a path was given."""
    if target:
        Path(target).write_text(json.dumps(record, indent=1) + "\n")
