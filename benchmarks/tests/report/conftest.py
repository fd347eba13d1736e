import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvdock_bench.methods import FULL_CACHE, MethodConfig
from kvdock_bench.record import MemoryUse, Record, Timings
from kvdock_bench.tasks.registry import GROUPS

NASTY = "<script>alert('x')</script> & </td> {{ 7 * 7 }} \"'>"
PROTOCOL = {
    "template": "chat:1",
    "answer_prefix": "after_header",
    "truncation": "none",
    "question": "aware",
    "stop_ids": [2],
    "stop": [],
}


@dataclass(frozen=True)
class Making:
    """What a made-up run consists of; `skill` is a method's chance of a right answer."""

    methods: tuple[MethodConfig, ...]
    tasks: tuple[str, ...] = ("niah_single_1", "vt")
    lengths: tuple[int, ...] = (512, 1024)
    samples: int = 8
    seed: int = 0
    benchmark: str = "RULER"
    model: str = "model-1"
    protocol: tuple[tuple[str, object], ...] = ()
    skill: tuple[tuple[str, float], ...] = ()
    skip: tuple[tuple[str, int, str], ...] = ()
    errors: tuple[tuple[str, int, str, str], ...] = ()
    prediction: str = "an answer"


def method(name, budget="128", **options):
    return MethodConfig(name, (name.lower(),), budget, {name.lower(): options})


@pytest.fixture
def making():
    return Making((FULL_CACHE, method("SnapKV", kernel=7), method("KIVI", None, bits=2)))


@pytest.fixture
def large():
    """13 methods, 5 lengths, 13 tasks, 50 samples: 42 250 answers."""
    names = "SnapKV H2O StreamingLLM L2Compress PyramidKV CakeKV CaM KIVI ThinK FlexPrefill"
    methods = [method(name) for name in [*names.split(), "XAttention", "Random"]]
    return Making(
        (FULL_CACHE, *methods),
        tasks=GROUPS["all"],
        lengths=(512, 1024, 2048, 4096, 8192),
        samples=50,
        skill=tuple((m.method_id, 0.9 - 0.06 * n) for n, m in enumerate(methods)),
        errors=((methods[5].method_id, 8192, "cwe", "oom"),),
    )


def make_run(folder: Path, made: Making) -> Path:
    """Write a run's folder as `kvdock bench` does."""
    folder.mkdir(parents=True)
    rng = random.Random(made.seed)
    skill = dict(made.skill)
    errors = {error[:3]: error[3] for error in made.errors}
    protocol = {**PROTOCOL, **dict(made.protocol)}
    for config in made.methods:
        name = config.method_id
        (folder / "pred" / name).mkdir(parents=True)
        for length in made.lengths:
            for task in made.tasks:
                place = name, length, task
                if place in made.skip:
                    continue
                lines = []
                for index in range(made.samples):
                    record = _record(made, config, length, task, index, rng)
                    right = rng.random() < skill.get(name, 0.95)
                    record = replace(record, score=float(right), protocol=protocol)
                    if place in errors and index == 0:
                        record = replace(
                            record,
                            error=errors[place],
                            score=None,
                            prediction=None,
                            timings=None,
                            memory=None,
                        )
                    lines.append(record.to_line())
                (folder / "pred" / name / f"{task}_{length}.jsonl").write_bytes(b"".join(lines))
    (folder / "run.json").write_text(json.dumps(_info(made)))
    return folder


def _record(made, config, length, task, index, rng):
    held = length or 256
    full = held * 46080
    share = 1.0 if config.is_full else (128 / held if config.budget else 0.2)
    return Record(
        key=f"{made.seed}-{config.method_id}-{length}-{task}-{index}",
        method_id=config.method_id,
        method=config.label,
        task=task,
        length=length,
        index=index,
        seed=made.seed,
        prompt_sha=f"{task}-{length}-{index}",
        n_prompt_tokens=length - 9,
        units=3,
        references=["4711"],
        data_source="offline substitute: Austen" if task != "vt" else "as RULER: generated",
        device="a device",
        batch_size=1,
        prediction=made.prediction,
        n_new_tokens=4,
        finish_reason="stop",
        timings=Timings(length / 9e3, length / 9e3, 0.1, 0.02 + share * length / 1e6, 0.4),
        memory=MemoryUse(None, int(full * share), full, share),
        protocol_id="id" if not made.protocol else "other",
        meta={"depths": [rng.randrange(1, 100) / 100]} if task.startswith("niah_single") else {},
    )


def _info(made):
    return {
        "schema_version": 1,
        "status": "finished",
        "command": f"kvdock bench {made.prediction}",
        "started": "2026-01-01T00:00:00Z",
        "ended": "2026-01-01T01:00:00Z",
        "config": {
            "benchmark_name": made.benchmark,
            "task_names": list(made.tasks),
            "length": list(made.lengths),
            "num_samples": made.samples,
            "seed": made.seed,
            "answer_prefix": "after_header",
        },
        "methods": [
            {"label": m.label, "method_id": m.method_id, **m.identity} for m in made.methods
        ],
        "identity": {"template": "chat:1"},
        "model": {"name": made.model, "fingerprint": made.model, "dtype": "float32"},
        "versions": {"python": "3"},
        "git": {"sha": "abc", "dirty": False},
        "hardware": {"device": "a device", "cores": 2},
    }


@pytest.fixture
def make(tmp_path):
    return lambda made, name="run": make_run(tmp_path / name, made)
