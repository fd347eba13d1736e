"""What `kvdock report` does: one report of the runs named, or what changed between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from kvdock_bench.columns import make_board
from kvdock_bench.diff import compare_runs
from kvdock_bench.diff_report import diff_lead, diff_tables, diff_warnings, write_diff
from kvdock_bench.errors import BenchError
from kvdock_bench.escaping import visible
from kvdock_bench.fingerprint import short_hash
from kvdock_bench.folder import RUN_FILE, check_tag, find_run
from kvdock_bench.mixing import check_protocols
from kvdock_bench.results import make_console, make_report, show_table
from kvdock_bench.runs import LoadedRun, load_run

REGRESSED = 1
_LONGEST_NAME = 100


def report(
    names: Sequence[str], output: Path, *, to: Path | None = None, allow_mixed: bool = False
) -> int:
    """Write the report of runs, named by folder or tag, and return the exit code.

    One run's report lies in its folder; that of several in a new folder of `output`.
    """
    folders = find_runs(names, output)
    runs = load_runs(folders)
    if to is None:
        to = folders[0] if len(folders) == 1 else output.expanduser() / _joint_name(runs)
    if to.resolve() not in [folder.resolve() for folder in folders]:
        _refuse_run(to)
    elif len(folders) > 1:
        raise BenchError(f"--to {to}: a run's own folder cannot take the report of several runs.")
    results, _ = make_report(runs, to, allow_mixed=allow_mixed)
    results.show(make_console())
    return 0


def find_runs(names: Sequence[str], output: Path) -> list[Path]:
    """Return the folders of runs; each may be named only once."""
    folders = [find_run(name, output) for name in names]
    places = Counter(folder.resolve() for folder in folders)
    twice = [str(place) for place, count in places.items() if count > 1]
    if twice:
        raise BenchError(f"{', '.join(twice)} is named twice.")
    return folders


def load_runs(folders: Sequence[Path]) -> list[LoadedRun]:
    """Read runs; those whose folders have the same name are told apart by their parents' names."""
    runs = [load_run(folder) for folder in folders]
    parents = 0
    while len({run.tag for run in runs}) < len(runs):
        parents += 1
        places = [folder.resolve().parts[-1 - parents :] for folder in folders]
        runs = [replace(run, tag="/".join(p)) for run, p in zip(runs, places, strict=True)]
    return runs


def _joint_name(runs: Sequence[LoadedRun]) -> str:
    tags = [run.tag.replace("/", "-") for run in runs]
    name = f"report_{'_'.join(tags)}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{short_hash(tags, 8)}"
    return check_tag(name)


def _refuse_run(to: Path) -> None:
    if (to / RUN_FILE).exists():
        raise BenchError(f"--to {to}: holds another run; its report must not be replaced.")


def diff(
    first: str, second: str, output: Path, *, to: Path | None = None, allow_mixed: bool = False
) -> int:
    """Print what changed from one run to another; return 1 if anything got worse, else 0."""
    runs = load_runs(find_runs([first, second], output))
    mixed = check_protocols(make_board(runs), allow_mixed=allow_mixed)
    found = compare_runs(*runs)
    warnings = [text for text in [mixed, *diff_warnings(found)] if text]
    console = make_console()
    for table in diff_tables(found):
        show_table(console, table)
    for text in [*warnings, diff_lead(found)]:
        console.print(Text(visible(text)), soft_wrap=True)
    if to is not None:
        text = f"Report: {write_diff(to, found, warnings)}"
        console.print(Text(visible(text)), soft_wrap=True)
    return REGRESSED if found.regressions else 0
