"""Sections of `decode_graph.py` whose every row comes from a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kvdock

HERE = Path(__file__).parent
PASSED_ON = ("batch", "length", "budget", "layers", "new-tokens")


def apart(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every system in its own process, and the peers that an interpreter can import."""
    jobs = [("full", "full")] if "full" in args.modes else []
    modes = [mode for mode in args.modes if mode in ("eager", "graph")]
    jobs += [(method, mode) for method in args.methods or kvdock.available() for mode in modes]
    script = str(HERE / "decode_graph.py")
    rows = []
    for system, mode in jobs:
        # a method's name is needed for the full cache too, which is timed alone
        method = [] if system == "full" else ["--methods", system]
        command = [sys.executable, script, "speed", *method, "--modes", mode]
        failed = {"system": system, "graph": {"eager": False, "graph": "auto"}.get(mode)}
        rows += _rows(command, args, failed)
    if "peers" not in args.modes:
        return rows
    peers = [args.peer_python or sys.executable, str(HERE / "decode_peers.py")]
    return rows + _rows(peers, args, {"system": "peers", "graph": False})


def capture(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the start of captured decode in processes of their own, the first without a cache."""
    script, rows = str(HERE / "decode_graph.py"), []
    for method in args.methods or ["snapkv"]:
        command = [sys.executable, script, "speed", "--methods", method]
        command += ["--modes", "graph", "graph"]
        with tempfile.TemporaryDirectory() as folder:
            where = {"TRITON_CACHE_DIR": f"{folder}/triton"}
            for starts in (["first use ever", "second use"], ["new process", "second use after"]):
                failed = {"system": method, "graph": "auto"}
                runs = _rows(command, args, failed, where)
                for start, run in zip(starts, runs, strict=False):
                    row = {name: run.get(name) for name in (*failed, "batch", "length", "budget")}
                    row |= {"start": start}
                    row |= {name: run.get(name) for name in ("start_s", "capture_s", "error")}
                    rows.append(row)
    return rows


def _rows(
    command: list[str],
    args: argparse.Namespace,
    failed: dict[str, Any],
    where: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run a command that writes its rows to `--out`; return them, or one that tells the failure."""
    for name in PASSED_ON:
        command = [*command, f"--{name}", str(getattr(args, name.replace("-", "_")))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        done = subprocess.run(
            [*command, "--out", str(path)],
            env=os.environ | (where or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        rows = json.loads(path.read_text())["speed"] if path.exists() else None
    if not isinstance(rows, list):
        reason = rows or (done.stderr.strip().splitlines() or ["no output"])[-1]
        case = {"batch": args.batch, "length": args.length}
        rows = [failed | case | {"error": f"exit {done.returncode}: {reason}"[:300]}]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows
