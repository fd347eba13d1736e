"""Compare a model on two GPUs with the same model on one: greedy tokens and bytes, every method.

Each way of running is a process group of its own, all at the same time: one GPU; layers spread by
`device_map`, which needs accelerate; tensor parallelism over two processes (NCCL). Tensor
parallelism adds in another order, which turns near ties in bfloat16, so it is compared in float32
only. On CPU two gloo processes take the place of the GPUs, without `device_map`.
From the repository's root:

    python benchmarks/scripts/two_gpus.py --out RESULTS.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from recording import describe, write
from two_gpus_worker import FULL, Answer, Task, serve

import kvdock
from kvdock.testing import tiny_model
from kvdock_bench.errors import BenchError
from kvdock_bench.metadata import describe_hardware
from kvdock_bench.placement import MAP, TENSOR, Place, parse_placement

ONE = "one"
WAYS = (
    ("float32", ONE),
    ("float32", MAP),
    ("float32", TENSOR),
    ("bfloat16", ONE),
    ("bfloat16", MAP),
)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
COMPOSED = ("snapkv+kivi", "snapkv+think", "flexprefill+snapkv+kivi")


class Group:
    """The processes of one way of running; they are replaced when a method breaks them.

    Args:
        patience: seconds for loading, and for each method.
    """

    def __init__(
        self,
        task: Task,
        dtype: str,
        way: str,
        devices: Sequence[str],
        methods: Sequence[str],
        patience: float,
    ) -> None:
        self.dtype, self.way = dtype, way
        self._task, self._devices, self._patience = task, devices, patience
        self._left = list(methods)
        self._processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.answers: dict[str, list[Answer]] = {}
        self._start()

    def take(self) -> None:
        """Read what the processes sent, and see who is late or gone."""
        for pipe in list(self.pipes):
            while pipe in self.pipes and pipe.poll():
                self._read(pipe)
        if self.pipes and time.monotonic() - self._heard > self._patience:
            self._lose(f"no answer within {self._patience:.0f} s")

    def end(self, reason: str) -> None:
        """Stop here."""
        self._fail(self._left, reason)

    def _start(self) -> None:
        for method in self._left:
            self.answers[method] = []  # what one of two processes said before the other was gone
        self._scratch = tempfile.TemporaryDirectory(prefix="kvdock-two-")
        meeting = (Path(self._scratch.name) / "meeting").as_uri()
        if self.way == TENSOR:
            ranks = len(self._devices)
            places = [Place((d,), rank, ranks, meeting) for rank, d in enumerate(self._devices)]
        else:
            places = [Place(tuple(self._devices))]
        context = multiprocessing.get_context("spawn")
        for place in places:
            ours, theirs = context.Pipe()
            arguments = (self._task, self.dtype, place, tuple(self._left), theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self.pipes.append(ours)
        self._heard, self._loaded = time.monotonic(), 0

    def _read(self, pipe: Connection) -> None:
        try:
            news: Answer | str | None = pipe.recv()
        except (EOFError, OSError):
            process = self._processes[self.pipes.index(pipe)]
            process.join()
            self._lose(f"a process ended with code {process.exitcode}")
            return
        self._heard = time.monotonic()
        if news is None:
            self._loaded += 1
        elif isinstance(news, str):
            self._fail(self._left, news)
        else:
            self._note(news)

    def _note(self, answer: Answer) -> None:
        """Keep an answer; the method is done when every process has given one."""
        found = self.answers[answer.method]
        found.append(answer)
        if answer.broken:
            self._lose(answer.error or "")
        elif len(found) == len(self.pipes):
            self._left.remove(answer.method)
            if not self._left:
                self._stop()

    def _lose(self, reason: str) -> None:
        """Give up the method at hand, and go on with the next ones in new processes."""
        if self._loaded < len(self.pipes):
            self._fail(self._left, f"while the model was loaded: {reason}")
            return
        self._fail(self._left[:1], reason)
        if self._left:
            self._start()

    def _fail(self, methods: Sequence[str], reason: str) -> None:
        self._stop()
        for method in list(methods):
            self.answers[method] = [Answer(method, error=reason)]
            self._left.remove(method)

    def _stop(self) -> None:
        for process in self._processes:
            if self._left:
                process.kill()
        for pipe in self.pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        self._processes, self.pipes = [], []
        self._scratch.cleanup()


def run(groups: Sequence[Group], deadline: float) -> None:
    """Return when every group is done, or at the deadline."""
    while pipes := [pipe for group in groups for pipe in group.pipes]:
        wait(pipes, timeout=0.1)
        for group in groups:
            group.take()
        if time.monotonic() > deadline:
            for group in groups:
                group.end("not reached in time")


def compare(
    dtype: str,
    way: str,
    alone: Mapping[str, Sequence[Answer]],
    found: Mapping[str, Sequence[Answer]],
) -> list[dict[str, Any]]:
    """Return one row a method: whether two devices gave the tokens and the bytes of one."""
    rows = []
    for method, answers in found.items():
        (one,) = alone[method]
        row: dict[str, Any] = {"dtype": dtype, "way": way, "method": method, "same": False}
        errors = [answer.error for answer in answers if answer.error is not None]
        if one.error is not None or errors:
            row["error"] = errors[0] if errors else f"on one device: {one.error}"
        else:
            apart = [place for place in (differences(one, other) for other in answers) if place]
            held = sum(answer.bytes_held for answer in answers)
            row |= {
                "same": not apart and held == one.bytes_held,
                "tokens": sum(map(len, one.tokens)),
                "first_difference": apart[0] if apart else None,
                "bytes_held": [answer.bytes_held for answer in answers],
                "bytes_held_on_one": one.bytes_held,
                "smallest_margin": min(min(margins) for margins in one.margins),
                "seconds": max(answer.seconds for answer in answers),
                "seconds_on_one": one.seconds,
            }
        rows.append(row)
    return rows


def differences(one: Answer, other: Answer) -> dict[str, Any] | None:
    """Return the earliest differing token, with the lead that the choice had on one device."""
    places = [
        (step, row)
        for row, (mine, theirs) in enumerate(zip(one.tokens, other.tokens, strict=True))
        for step, pair in enumerate(zip(mine, theirs, strict=False))
        if pair[0] != pair[1]
    ]
    if not places:
        return None if one.tokens == other.tokens else {"step": None, "row": None, "margin": None}
    step, row = min(places)
    return {"step": step, "row": row, "margin": one.margins[row][step]}


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    print("| dtype | way | method | same | tokens | smallest margin | s | s on one |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['dtype']} | {row['way']} | {row['method']} |"
        if "error" in row:
            print(f"{start} {row['error']} | | | | |")
            continue
        said = "yes" if row["same"] else f"NO: {row['first_difference'] or 'bytes'}"
        print(
            f"{start} {said} | {row['tokens']} | {row['smallest_margin']:.2e} | {row['seconds']} |"
            f" {row['seconds_on_one']} |"
        )


def main() -> int:
    """Run every way, print and store the comparison; 1 where anything differs or failed."""
    args = _arguments()
    begun = time.monotonic()
    devices = _devices(args.device)
    on_cpu = devices[0] == "cpu"
    methods = args.methods or [FULL, *kvdock.available(), *COMPOSED]
    ways = [(d, w) for d, w in WAYS if d in args.dtypes and not (on_cpu and w == MAP)]
    ways = [
        (d, w) for d, w in ways if w != ONE or any(o == (d, x) for o in ways for x in (MAP, TENSOR))
    ]
    lengths = (args.tokens, args.tokens * 7 // 10, args.tokens // 3)
    with tempfile.TemporaryDirectory(prefix="kvdock-two-") as scratch:
        if args.model_path is None:
            tiny_model("llama", **SHAPE).save_pretrained(scratch)
        folder = args.model_path or scratch
        task = Task(folder, args.model_path is not None, lengths, args.new)
        groups = {
            way: Group(task, *way, devices[: 1 if way[1] == ONE else 2], methods, args.patience)
            for way in ways
        }
        run(list(groups.values()), begun + args.seconds)
    rows = [
        row
        for (dtype, way), group in groups.items()
        if way != ONE
        for row in compare(dtype, way, groups[dtype, ONE].answers, group.answers)
    ]
    table(rows)
    record = {
        "environment": describe("two_gpus.py", methods, torch.device(devices[0]))
        | {"hardware": describe_hardware([torch.device(device) for device in devices])},
        "model": Path(args.model_path).name if args.model_path else {"random llama": SHAPE},
        "prompts": {"tokens": lengths, "new": args.new, "budget": task.budget},
        "seconds": round(time.monotonic() - begun, 1),
        "same": sum(row["same"] for row in rows),
        "rows": rows,
    }
    write(args.out, record)
    print(f"{record['same']} of {len(rows)} are the same; {record['seconds']} s")
    return 0 if record["same"] == len(rows) else 1


def _devices(names: Sequence[str]) -> tuple[str, ...]:
    if list(names) == ["cpu"]:
        return ("cpu", "cpu")
    placement = parse_placement(names or ["0", "1"], "2", visible=torch.cuda.device_count())
    return placement.devices(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", help="a local folder; default: a random llama")
    parser.add_argument("--device", nargs="+", default=[], help="two GPUs' indices, or cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", help="default: full, all installed, compositions")
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest of three prompts")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--patience", type=float, default=60, help="seconds for one method")
    parser.add_argument("--seconds", type=float, default=110, help="for everything")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(str(error))
