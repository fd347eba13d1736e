"""Find out whether the answers of one table were asked for in the same way."""

from __future__ import annotations

from typing import Any

from kvdock_bench.columns import Board
from kvdock_bench.errors import BenchError
from kvdock_bench.fingerprint import short_hash
from kvdock_bench.protocol import Protocol
from kvdock_bench.record import Record
from kvdock_bench.runs import LoadedRun

_UNKNOWN = "not recorded"
# the full cache has no budget and stands beside every method
_MAY_DIFFER = ("budget",)


def check_protocols(board: Board, *, allow_mixed: bool) -> str:
    """Return a warning that names what differs, empty if nothing does.

    Tasks may differ from each other, as some suites want; the columns of one task may not.
    """
    differences = _differences(board)
    if not differences:
        return ""
    text = "; ".join(differences)
    if not allow_mixed:
        raise BenchError(
            f"{board.benchmark}: the answers were not asked for in the same way, so their scores "
            f"do not compare. {text}. Make one report for each protocol, or put them into one "
            "table with --allow-mixed."
        )
    return f"Mixed protocols, so the columns do not compare fairly. {text}."


def _differences(board: Board) -> list[str]:
    """Return a text per key of the protocol that has several values for the same task."""
    asked = [
        (task, run.tag, protocol)
        for run in board.runs
        for task, protocols in _protocols(run).items()
        for protocol in protocols
    ]
    names = dict.fromkeys(name for _, _, protocol in asked for name in protocol)
    found: dict[str, dict[str, dict[str, dict[str, None]]]] = {}
    for name in (name for name in names if name not in _MAY_DIFFER):
        for task, tag, protocol in asked:
            values = found.setdefault(name, {}).setdefault(task, {})
            values.setdefault(_text(protocol.get(name, _UNKNOWN)), {})[tag] = None
    texts = []
    for name, by_task in found.items():
        mixed = {task: values for task, values in by_task.items() if len(values) > 1}
        if mixed:
            first = next(iter(mixed.values()))
            told = ", ".join(f"{value} ({', '.join(tags)})" for value, tags in first.items())
            where = "" if len(mixed) == len(by_task) else f" in {', '.join(mixed)}"
            texts.append(f"{name}{where}: {told}")
    return texts


def _protocols(run: LoadedRun) -> dict[str, list[Protocol]]:
    """Return each task's different protocols."""
    found: dict[str, dict[str, Protocol]] = {}
    for record in run.records:
        by_name = found.setdefault(record.task, {})
        if record.protocol_id not in by_name:
            by_name[record.protocol_id] = _protocol(run, record)
    return {task: list(by_name.values()) for task, by_name in found.items()}


def _protocol(run: LoadedRun, record: Record) -> Protocol:
    """Return a record's protocol; for those of version 1 as far as run.json tells it."""
    if record.protocol:
        return record.protocol
    config = run.info["config"]
    cap = config.get("max_length")
    raw = record.task in config.get("no_template_tasks", ())
    return {
        "template": "raw" if raw else run.info["identity"]["template"],
        "answer_prefix": config.get("answer_prefix", _UNKNOWN),
        "truncation": "none" if cap is None else f"middle:{cap}",
        "question": "aware",
        "stop_ids": _UNKNOWN,
        "stop": list(config.get("generation", {}).get("stop", ())),
    }


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if not text:
        return "none"
    return text if len(text) <= 60 else f"{text[:40]}… #{short_hash(text, 6)}"
