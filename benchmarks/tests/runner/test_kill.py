"""A run killed at any moment continues to exactly the planned answers."""

import json
import os
import random
import signal
import subprocess
import sys
import time

from kvdock_bench.session import bench

CHILD = """
import sys
from kvdock.cli import main
sys.exit(main())
"""
PLANNED = 12


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


def test_killed_runs_continue(arguments):
    command = [
        *(sys.executable, "-c", CHILD, "bench", "--model_path", arguments.model_path),
        *("--cfg_path", arguments.cfg_path, "--device", "cpu", "--save_tag", "killed", "--resume"),
        *("--output_dir", str(arguments.output_dir)),
    ]
    folder = arguments.output_dir / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random()
    for wanted in (1, 4, 9):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while lines(folder) < wanted and child.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
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
