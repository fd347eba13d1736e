"""A run killed at any moment continues to exactly the planned answers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvdock_bench.session import bench

CHILD = """
import sys
from kvdock.cli import main
sys.exit(main())
"""
PLANNED = 12
PATIENCE_S = 300
ORPHANS_S = 60
MORE = """
task_names: [niah_single_1, niah_multikey_1]
length: [640, 768]
num_samples: 40
generation: {max_new_tokens: 6}
"""


def answers(folder):
    found = {}
    for path in sorted((folder / "pred").glob("*/*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                record = json.loads(line)
                assert record["key"] not in found, "an answer was made twice"
                found[record["key"]] = record
    return found


def lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in (folder / "pred").glob("*/*.jsonl"))


def told(folder):
    """Return what a record says apart from times and batches."""
    names = ("prediction", "score", "error", "finish_reason", "prompt_sha", "task", "index")
    return {key: [record[name] for name in names] for key, record in answers(folder).items()}


def command_of(arguments, *more):
    return [
        *(sys.executable, "-c", CHILD, "bench", "--model_path", arguments.model_path),
        *("--cfg_path", arguments.cfg_path, "--device", "cpu", "--save_tag", "killed", "--resume"),
        *("--output_dir", str(arguments.output_dir), *more),
    ]


def wait_for(folder, wanted, child, most=None):
    """Wait until so many answers are stored, and return whether the run is still alive.

    Args:
        most: seconds after which it is no matter; None means that they have to come.
    """
    until = time.monotonic() + (PATIENCE_S if most is None else most)
    while lines(folder) < wanted and child.poll() is None:
        if time.monotonic() > until:
            assert most is not None, f"{lines(folder)} answers, {wanted} were expected"
            break
        time.sleep(0.002)
    return child.poll() is None


def kill_all(child):
    """Kill the driver and whoever shares its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def processes_of(scratch):
    """Return the living processes that were started with this TMPDIR, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={scratch}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = words.decode(errors="replace")
    return found


def wait_until_gone(scratch):
    """Wait until a killed run has left no process; those that stay are killed and told."""
    until = time.monotonic() + ORPHANS_S
    while (left := processes_of(scratch)) and time.monotonic() < until:
        time.sleep(0.1)
    for one in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    assert not left, f"alive {ORPHANS_S} s after their driver was killed: {left}"


def test_killed_runs_continue(arguments):
    command = command_of(arguments)
    folder = arguments.output_dir / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random()
    for wanted in (1, 7):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for(folder, wanted, child)
        time.sleep(chance.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert wanted <= len(answers(folder))
    # what a kill in the middle of a write can leave, on a file system that does not forget
    torn = next((folder / "pred").glob("*/*.jsonl"))
    with torn.open("ab") as file:
        file.write(b'{"key":"half')
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = answers(folder)
    assert len(found) == PLANNED
    bench(arguments)
    straight = answers(arguments.output_dir / "run")
    assert {k: r["prediction"] for k, r in found.items()} == {
        k: r["prediction"] for k, r in straight.items()
    }
    assert not list(folder.glob("*.tmp"))


def one_round(command, scratch, folder, what, wanted, chance, worker_name):
    """Start the run and kill it at some moment; return when that was and the answers then."""
    before, begun = lines(folder), time.monotonic()
    log = Path(scratch) / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        if what == "any":
            wait_for(folder, before + wanted, child, chance.uniform(0, 40))
        else:
            assert wait_for(folder, before + wanted, child), log.read_text()
            time.sleep(chance.random() * 0.05)
        if what == "worker":
            living = processes_of(scratch)
            workers = [one for one, words in living.items() if worker_name in words]
            assert workers, living
            os.kill(chance.choice(workers), signal.SIGKILL)
            assert wait_for(folder, lines(folder) + 3, child), log.read_text()
        assert child.poll() is None, log.read_text()
    finally:
        kill_all(child)
    moment, found = time.monotonic() - begun, lines(folder)
    wait_until_gone(scratch)
    return moment, found


def kill_often(arguments, launcher, worker_name, rounds, planned):
    """Kill a run of two workers in every round, then let it end and compare it.

    Args:
        worker_name: what a worker's command line holds.
        rounds: "all" kills the driver's process group after some answers, "any" at any moment, and
            "worker" kills one worker before, which the run has to survive.
    """
    command = command_of(arguments, "--workers", "2", "--launcher", launcher)
    seed = int(os.environ.get("KVDOCK_KILL_SEED") or random.SystemRandom().randrange(1 << 20))
    print(f"KVDOCK_KILL_SEED={seed}")
    folder, chance = arguments.output_dir / "killed", random.Random(seed)
    # killed runs leave their scratch, and Ray's sockets need a short path
    with tempfile.TemporaryDirectory(prefix="kvd-", ignore_cleanup_errors=True) as scratch:
        for number, what in enumerate(rounds):
            share = (planned - lines(folder)) // (len(rounds) - number + 1)
            wanted = chance.randint(1, max(1, share // 2))
            moment, found = one_round(command, scratch, folder, what, wanted, chance, worker_name)
            print(f"{what}: killed after {moment:.2f} s, {found} answers")
            answers(folder)
        assert lines(folder) < planned, "the run ended before the last kill"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        wait_until_gone(scratch)
    bench(arguments)
    found = told(folder)
    assert len(found) == planned
    assert found == told(arguments.output_dir / "run")
    assert {record[2] for record in found.values()} == {None}
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_two_killed_processes_continue(arguments):
    kill_often(arguments, "processes", "spawn_main", ("worker", "all"), PLANNED)


@pytest.mark.slow
def test_two_workers_in_ray_continue_after_ten_kills(arguments, tmp_path):
    pytest.importorskip("ray")
    config = tmp_path / "more.yaml"
    config.write_text(MORE)
    rounds = ("all", "any", "worker", "all", "all", "worker", "any", "all", "worker", "all")
    kill_often(replace(arguments, cfg_path=str(config)), "ray", "ray::Actor", rounds, 160)
