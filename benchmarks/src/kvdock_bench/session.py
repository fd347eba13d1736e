"""One `kvdock bench` from its arguments to its report."""

from __future__ import annotations

import reprlib
import shlex
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import kvdock
from kvdock_bench import metadata, models
from kvdock_bench.arguments import Arguments
from kvdock_bench.atomic import write_json
from kvdock_bench.config import BenchConfig
from kvdock_bench.context import check_lengths
from kvdock_bench.crew import Crew, crew_of
from kvdock_bench.dry_run import budget_warnings, show_plan
from kvdock_bench.errors import BenchError
from kvdock_bench.folder import RUN_FILE, check_tag, default_tag, locked, open_run, read_run
from kvdock_bench.oom import release
from kvdock_bench.placement import Placement
from kvdock_bench.plan import SCHEMA_VERSION, Cell, Plan, make_plan, record_key
from kvdock_bench.preflight import (
    check_dtypes,
    choose_placement,
    effective_config,
    find_engine,
    parse_columns,
)
from kvdock_bench.progress import progress
from kvdock_bench.records import RecordStore
from kvdock_bench.results import config_of, make_console, make_results
from kvdock_bench.run import Attach
from kvdock_bench.run_info import check_info
from kvdock_bench.runs import methods_of
from kvdock_bench.sources import load_data
from kvdock_bench.vllm.crew import served_crew
from kvdock_bench.worker import Setup

DONE, FAILED, INTERRUPTED = 0, 1, 130


def bench(arguments: Arguments, *, attach: Attach = kvdock.attach) -> int:
    """Run what the arguments ask for and return the exit code."""
    console = make_console()
    config = effective_config(arguments)
    columns = parse_columns(arguments)
    methods = [method for part in columns.values() for method in part]
    placement = choose_placement(arguments)
    dtype = models.parse_dtype(arguments.torch_dtype, "cpu" if placement.cpu else "cuda")
    check_dtypes(methods, dtype)
    data = load_data(config.data)
    trust = arguments.trust_remote_code
    if trust:
        models.warn_of_remote_code(arguments.model_path)
    if arguments.dry_run:
        check_lengths(config, models.peek_context(arguments.model_path, trust_remote_code=trust))
        plan = make_plan(config, methods, data)
        shape = models.peek_shape(arguments.model_path, trust_remote_code=trust)
        show_plan(console, plan, shape, dtype)
        return DONE
    engine = find_engine(arguments)
    tag = check_tag(arguments.save_tag or _default_tag(arguments, config))
    folder = open_run(
        arguments.output_dir, tag, resume=arguments.resume, overwrite=arguments.overwrite
    )
    check_lengths(config, models.peek_context(arguments.model_path, trust_remote_code=trust))
    code = DONE
    with locked(folder):
        for server, part in columns.items():
            plan = make_plan(config, part, data)
            setup = Setup(
                model_path=arguments.model_path,
                dtype=dtype,
                plan=plan,
                adapter_path=arguments.adapter_path,
                time_limit=arguments.time_limit,
                trust_remote_code=trust,
                attach=attach,
            )
            store = RecordStore(folder)
            chosen: AbstractContextManager[Crew] = (
                crew_of(setup, placement, store, arguments.launcher)
                if engine is None or server != "vllm"
                else served_crew(setup, placement, store, engine, folder)
            )
            with chosen as crew:
                session = _Session(arguments, plan, placement, folder, store, crew, console)
                code = max(code, session.run())
            # the next server needs the memory
            del crew, session
            release()
            if code == INTERRUPTED:
                break
    return code


@dataclass(slots=True)
class _Session:
    arguments: Arguments
    plan: Plan
    placement: Placement
    folder: Path
    store: RecordStore
    crew: Crew
    console: Console

    def run(self) -> int:
        """Generate what is missing, write the results, and return the exit code."""
        metadata_ = self._prepare()
        write_json(self.folder / RUN_FILE, metadata_)
        missing = [(cell.length, len(self._missing(cell))) for cell in self.plan.cells]
        samples = sum(count for _, count in missing)
        tokens = sum(length * count for length, count in missing)
        done = self.plan.n_samples - samples
        self._say(f"{self.folder}: {samples} answers to generate, {done} are there.")
        for warning in budget_warnings(self.plan):
            self._say(warning)
        started, code = time.perf_counter(), DONE
        status = "failed"
        try:
            if samples:
                metadata_ |= self.crew.begin(self._say)
                with progress(self.console, tokens, samples) as reporter:
                    self.crew.work(self.plan, self._missing, reporter)
            status = "finished"
        except KeyboardInterrupt:
            status, code = "interrupted", INTERRUPTED
        finally:
            metadata_ |= {"status": status, "ended": metadata.now()}
            metadata_["sessions"][-1]["seconds"] = round(time.perf_counter() - started, 3)
            write_json(self.folder / RUN_FILE, metadata_)
        report, failed = make_results(self.folder, metadata_, list(self.store.by_key.values()))
        report.show(self.console)
        if code == INTERRUPTED:
            self._say(f"Interrupted. Continue with:\n  {self._resume_command()}")
        elif failed:
            code = FAILED
            self._say(f"{failed} cells have errors: {self.store.error_log}")
        return code

    def _missing(self, cell: Cell) -> list[int]:
        """Return the indices of a cell's samples that are still to do."""
        config, identity = self.plan.config, self.crew.facts.identity
        count = self.plan.count(cell.task.name)
        keys = (record_key(identity, cell, config, index) for index in range(count))
        return [index for index, key in enumerate(keys) if not self.store.is_finished(key)]

    def _prepare(self) -> dict[str, Any]:
        """Read what the folder holds already and return the run's metadata."""
        self.store.load(repair=True)
        earlier = read_run(self.folder) if (self.folder / RUN_FILE).exists() else None
        if earlier is not None:
            check_info(self.folder, earlier, resumed=True)
            _check_same(earlier, self.crew.facts.identity, self.plan.config)
        return self._metadata(earlier)

    def _metadata(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
        facts = self.crew.facts
        identity = facts.identity
        # columns of earlier sessions stay in the table
        methods = list(self.plan.methods)
        sessions = []
        if earlier is not None:
            present = {method.method_id for method in methods}
            methods += [old for name, old in methods_of(earlier).items() if name not in present]
            methods.sort(key=lambda method: not method.is_full)
            sessions = earlier["sessions"]
            identity = {**identity, "data": {**earlier["identity"]["data"], **identity["data"]}}
        command = shlex.join(self.arguments.command)
        started = metadata.now()
        ids = sorted({name for method in methods for name in method.ids})
        return {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "command": command,
            "started": sessions[0]["started"] if sessions else started,
            "ended": None,
            "sessions": [*sessions, {"started": started, "command": command}],
            "config": self.plan.config.model_dump(mode="json"),
            "counts": dict(self.plan.counts),
            "methods": [
                {
                    "label": method.label,
                    "method_id": method.method_id,
                    **method.identity,
                }
                for method in methods
            ],
            "identity": identity,
            "data": facts.data,
            # another server's columns stand beside those of the model that is described already
            "model": earlier["model"] if self.crew.name == "vllm" and earlier else facts.model,
            "vllm": earlier.get("vllm") if earlier is not None else None,
            "versions": metadata.describe_software(ids),
            "git": metadata.describe_git(),
            "hardware": facts.hardware,
            "placement": {
                **self.placement.describe(),
                "workers": self.crew.workers,
                "launcher": self.crew.name,
            },
            "environment": metadata.environment(),
        }

    def _resume_command(self) -> str:
        words = [word for word in self.arguments.command if word not in ("--overwrite", "--resume")]
        return shlex.join([*words, "--resume"])

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _default_tag(arguments: Arguments, config: BenchConfig) -> str:
    return default_tag(models.short_name(arguments.model_path), config.benchmark_name)


def _check_same(earlier: dict[str, Any], identity: dict[str, Any], config: BenchConfig) -> None:
    """Refuse to continue a run with settings that would make its answers incomparable."""
    before = config_of(earlier)
    pairs = {name: (earlier["identity"][name], identity[name]) for name in ("model", "template")}
    prompting = ("answer_prefix", "question", "max_length")
    for name in ("seed", *prompting, "generation", "data", "task_args"):
        pairs[name] = (getattr(before, name), getattr(config, name))
    changed = [
        f"{name} was {reprlib.repr(old)}, is {reprlib.repr(new)}"
        for name, (old, new) in pairs.items()
        if old != new
    ]
    if changed:
        raise BenchError(
            f"--resume: the run in the folder was made differently: {'; '.join(changed)}. Its "
            "answers would not compare. Use the same settings, another --save_tag, or --overwrite."
        )
