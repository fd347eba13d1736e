"""Run a grid of methods, budgets and lengths on RULER in parallel processes on one machine.

Usage: python ruler_grid.py --methods full random snapkv "snapkv:kernel=21" kivi:bits=4
       --budgets 64 128 --lengths 512 1024 --workers 12 --device cuda:0 --out DIR

Decoding a small model in batches leaves a GPU idle between launches: processes that share it fill
the gaps. Times of single answers mean nothing here and are not written.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from grid_jobs import Chunk, Job, check_dtype, chunks_of, grid_config, plan_jobs, variants
from grid_tables import Grid, summarise, to_markdown
from grid_worker import Done, Setup, work

import kvdock
from kvdock.errors import KVDockError
from kvdock_bench import models
from kvdock_bench.atomic import write_json, write_text
from kvdock_bench.record import Record
from kvdock_bench.records import RecordStore

GRACE_S = 20.0


class Pool:
    """Hand jobs to worker processes, one at a time each; a process that dies is replaced."""

    def __init__(
        self,
        setup: Setup,
        jobs: Sequence[Job],
        workers: int,
        deadline: float,
        devices: Sequence[str],
    ) -> None:
        self._setup, self._deadline = setup, deadline
        self._devices = itertools.cycle(devices)
        self._waiting: list[Job | Chunk] = [*chunks_of(setup.config), *jobs]
        self._spawn = multiprocessing.get_context("spawn")
        self._busy: dict[Connection, tuple[BaseProcess, Job | Chunk | None]] = {}
        self._deaths_left = 2 * workers
        self.done: dict[int, Done] = {}
        self._total = len(jobs)
        for _ in range(min(workers, len(jobs))):
            self._start()

    def run(self) -> None:
        """Return when every job is done, or soon after the deadline."""
        while self._busy:
            left = self._deadline + GRACE_S - time.monotonic()
            if left <= 0:
                break
            for pipe in wait(list(self._busy), timeout=min(left, 60.0)):
                self._receive(pipe)  # type: ignore[arg-type]
        for process, _ in self._busy.values():
            process.kill()

    def _start(self) -> None:
        ours, theirs = self._spawn.Pipe()
        setup = dataclasses.replace(self._setup, device=next(self._devices))
        process = self._spawn.Process(target=work, args=(setup, theirs), daemon=True)
        process.start()
        # only the child holds its end then, so that its death ends the pipe
        theirs.close()
        self._busy[ours] = process, None

    def _receive(self, pipe: Connection) -> None:
        process, job = self._busy[pipe]
        try:
            done: Done | None = pipe.recv()
            if done is not None:
                self._finish(done, job)
            following = self._next()
            pipe.send(following)
        except (EOFError, OSError):
            self._bury(pipe)
            return
        self._busy[pipe] = process, following
        if following is None:
            del self._busy[pipe]

    def _next(self) -> Job | Chunk | None:
        late = time.monotonic() >= self._deadline
        return None if late or not self._waiting else self._waiting.pop(0)

    def _finish(self, done: Done, job: Job | Chunk | None) -> None:
        self.done[done.number] = done
        name = job.name if job else ""
        print(f"{len(self.done)}/{self._total} {name}: {done.seconds:.1f} s", flush=True)
        for text in [*done.notes, *([done.error] if done.error else [])]:
            print(f"  {text}", flush=True)

    def _bury(self, pipe: Connection) -> None:
        process, job = self._busy.pop(pipe)
        process.join()
        where = job.name if job else "between jobs"
        print(f"A worker ended with code {process.exitcode}: {where}", flush=True)
        self._deaths_left -= 1
        if self._waiting and self._deaths_left > 0 and time.monotonic() < self._deadline:
            self._start()


def main(arguments: Sequence[str]) -> int:
    """Run the grid, write its files, and return 0 when nothing is missing."""
    started = time.monotonic()
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    config = grid_config(
        args.group,
        lengths=args.lengths,
        samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    methods = variants(args.methods, args.budgets)
    check_dtype(methods, args.dtype)
    jobs = plan_jobs(methods, args.lengths)
    # fetches and converts the embedded model once, before the workers look for it
    models.locate(args.model_path)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        place = args.device[0]
        setup = Setup(args.model_path, args.dtype, place, config, Path(scratch), args.batch_tokens)
        pool = Pool(setup, jobs, args.workers, started + args.deadline, args.device)
        pool.run()
        found = [(job, record) for job in jobs for record in _records(setup.folder, job)]
    run = {
        **environment(arguments, args.device[0]),
        "config": config.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started, 1),
        "unfinished": [job.name for job in jobs if job.number not in pool.done],
        "jobs": [_describe(job, pool.done.get(job.number)) for job in jobs],
        "errors": _errors(record for _, record in found),
    }
    write_json(args.out / "run.json", run)
    write_records(args.out / "records.jsonl.gz", found)
    grid = Grid(
        (record for _, record in found),
        lengths=args.lengths,
        tasks=[task.name for task in config.tasks],
        samples=args.samples,
    )
    rows = summarise(grid, methods)
    write_json(args.out / "summary.json", {"schema_version": 1, "rows": rows})
    table = to_markdown(rows, args.lengths)
    if run["unfinished"]:
        table += "\nUnfinished: " + "; ".join(run["unfinished"]) + "\n"
    write_text(args.out / "table.md", table)
    print(table)
    print(f"{run['seconds']} s, {len(found)} answers, {len(run['unfinished'])} jobs unfinished")
    return int(not all(row["complete"] for row in rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run a RULER grid in parallel processes.")
    parser.add_argument("--model_path", default="smollm2-135m")
    parser.add_argument("--group", default="light", help="tasks, groups, or a YAML file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument(
        "--budgets", nargs="+", default=["64", "128", "256"], help="128, 25%%, 1GiB"
    )
    parser.add_argument("--methods", nargs="+", required=True, help="full, a, a+b, a:option=value")
    parser.add_argument("--samples", type=int, default=50, help="per task and length")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--batch-tokens", type=int, default=160_000, help="the most prompt tokens of a batch"
    )
    parser.add_argument("--workers", type=int, default=12, help="on all devices together")
    parser.add_argument("--dtype", choices=models.DTYPES, default="bfloat16")
    parser.add_argument("--device", nargs="+", default=["cuda:0"], help="cuda:N ... or cpu")
    parser.add_argument("--seed", type=int, help="of the prompts; default: the config's")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def _records(folder: Path, job: Job) -> list[Record]:
    store = RecordStore(folder / str(job.number))
    # a killed worker may have left a torn line
    store.load(repair=False)
    return list(store.by_key.values())


def write_records(path: Path, found: Sequence[tuple[Job, Record]]) -> None:
    """Write one line per answer; answers to one prompt lie together, which compresses well."""
    found = sorted(found, key=lambda pair: (pair[1].length, pair[1].task, pair[1].index))
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=9) as file:
        for job, record in found:
            line = {
                "method": job.method.label,
                "options": job.method.identity["options"],
                "budget": job.method.budget,
                "task": record.task,
                "length": record.length,
                "index": record.index,
                "prediction": record.prediction,
                "references": record.references,
                "score": record.score,
                "n_input_tokens": record.n_prompt_tokens,
                "error": record.error and without_paths(record.error),
            }
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _describe(job: Job, done: Done | None) -> dict[str, Any]:
    return {
        "method": job.method.label,
        "budget": job.method.budget,
        "length": job.length,
        "seconds": done and round(done.seconds, 2),
        "error": done and done.error and without_paths(done.error),
        "notes": done and [without_paths(text) for text in done.notes[:5]],
    }


def _errors(records: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        if record.error:
            text = without_paths(record.error)[:200]
            counts[text] = counts.get(text, 0) + 1
    return counts


def without_paths(text: str) -> str:
    """Keep only the last part of absolute paths, which differ between machines."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":=,]+/)*([^\s/'\":=,]+)", r"\1", text)


def environment(arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Return command, commit, versions and hardware."""
    command = ["python", Path(__file__).name, *map(without_paths, arguments)]
    return {
        "command": shlex.join(command),
        "commit": os.environ.get("KVDOCK_COMMIT") or _commit(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "kvdock": kvdock.__version__,
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KVDockError as error:
        sys.exit(f"Error: {error}")
