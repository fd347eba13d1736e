"""Read what benchmarks/scripts/ruler_grid.py writes: answers of many methods, without times."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

from kvdock_bench.config import make_config
from kvdock_bench.errors import BenchError
from kvdock_bench.fingerprint import short_hash
from kvdock_bench.methods import MethodConfig
from kvdock_bench.plain_json import read_json
from kvdock_bench.record import Record
from kvdock_bench.sources import load_data

GRID_FILE = "records.jsonl.gz"
_UNKNOWN = "not recorded"
_VERSIONS = ("python", "kvdock", "torch", "transformers")


def is_grid(folder: Path) -> bool:
    """Tell whether the folder holds a grid rather than a run of `kvdock bench`."""
    return (folder / GRID_FILE).is_file()


def read_grid(
    folder: Path, info: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, MethodConfig], list[Record]]:
    """Return run.json in the layout of `kvdock bench`, the methods by id, and the records."""
    path = folder / GRID_FILE
    found: dict[tuple[str, str | None], MethodConfig] = {}
    lines = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = read_json(text)
                    name = line["method"], line["budget"]
                    if name not in found:
                        found[name] = _method(line)
                    lines.append((found[name], line))
                except (KeyError, TypeError, ValueError) as error:
                    raise BenchError(f"{path}, line {number} is damaged: {error!r}.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BenchError(f"Cannot read {path} ({error}).") from error
    several = {
        method.ids
        for method in found.values()
        if sum(other.label == method.label for other in found.values()) > 1
    }
    methods = {}
    # by budget, slots before shares, as the grid's own tables stand
    for method in sorted(found.values(), key=lambda m: (not m.is_full, _size(m.budget))):
        label = f"{method.label} {method.budget}" if method.ids in several else method.label
        methods[method.method_id] = MethodConfig(label, method.ids, method.budget, method.options)
    try:
        sources = _sources(info["config"])
        records = [_record(method, line, info, sources) for method, line in lines]
        return _layout(info), methods, records
    except (KeyError, TypeError) as error:
        raise BenchError(f"{folder} does not hold a grid of this version ({error!r}).") from error


def _size(budget: str | None) -> tuple[str, float]:
    number = re.match(r"[0-9.]+", budget or "")
    if budget is None or number is None:
        return budget or "", 0.0
    return budget[number.end() :], float(number[0])


def _method(line: dict[str, Any]) -> MethodConfig:
    ids = tuple(line["options"])
    label = line["method"] if ids else "Full cache"
    return MethodConfig(label, ids, line["budget"], line["options"])


def _sources(config: dict[str, Any]) -> dict[str, str]:
    """Return where each task's texts came from; a report must not need the texts themselves."""
    try:
        checked = make_config(config, GRID_FILE)
        data = load_data(checked.data)
        return {task.name: task.data_source(data) for task in checked.tasks}
    except BenchError:
        return dict.fromkeys(config["task_names"], _UNKNOWN)


def _record(
    method: MethodConfig, line: dict[str, Any], info: dict[str, Any], sources: dict[str, str]
) -> Record:
    return Record(
        key="",
        method_id=method.method_id,
        method=method.label,
        task=line["task"],
        length=line["length"],
        index=line["index"],
        seed=info["config"]["seed"],
        prompt_sha="",
        n_prompt_tokens=line["n_input_tokens"],
        units=0,
        references=line["references"],
        data_source=sources[line["task"]],
        device=info.get("gpu") or "CPU",
        batch_size=info["config"]["batch_size"],
        prediction=line["prediction"],
        score=line["score"],
        error=line["error"],
    )


def _layout(info: dict[str, Any]) -> dict[str, Any]:
    words = re.findall(r"--(model_path|dtype) (\S+)", info["command"])
    named = {"model_path": _UNKNOWN, "dtype": _UNKNOWN, **dict(words)}
    model = named["model_path"].rstrip("/").rpartition("/")[2]
    unfinished = len(info["unfinished"])
    return {
        "status": "unfinished" if unfinished else "finished",
        "command": info["command"],
        "started": _UNKNOWN,
        "config": info["config"],
        "model": {
            "name": model,
            "dtype": named["dtype"],
            "attention": _UNKNOWN,
            "fingerprint": short_hash({"grid": model, "dtype": named["dtype"]}),
        },
        "versions": {name: info.get(name, "").split("+")[0] for name in _VERSIONS},
        "hardware": {"device": info.get("gpu") or "CPU", "cores": info["cores"]},
        "git": {"sha": info["commit"]} if info.get("commit") else None,
        "identity": {"template": _UNKNOWN},
    }
