"""The stored answers of the grid script, read as a run."""

import gzip
import json
from pathlib import Path

import pytest

from kvdock_bench.columns import make_board
from kvdock_bench.errors import BenchError
from kvdock_bench.mixing import check_protocols
from kvdock_bench.runs import load_run
from kvdock_bench.summary import summarise

STORED = Path(__file__).parents[2] / "results" / "ruler-light-smollm2-h100"


@pytest.fixture
def grid(tmp_path):
    """A grid of two methods, one of them with two budgets, and how to change its lines."""
    info = json.loads((STORED / "run.json").read_text())
    info["config"] |= {"task_names": ["niah_single_1"], "length": [512], "num_samples": 4}
    (tmp_path / "run.json").write_text(json.dumps(info))

    def write(change=lambda line: line, budgets=("25%", "64", "128")):
        variants = [("full", {}, None), *(("snapkv", {"snapkv": {}}, b) for b in budgets)]
        lines = [
            {
                "method": name, "options": options, "budget": budget, "task": "niah_single_1",
                "length": 512, "index": index, "prediction": "x", "references": ["y"],
                "score": float(budget != "64"), "n_input_tokens": 500, "error": None,
            }
            for index in range(4)
            for name, options, budget in variants
        ]  # fmt: skip
        with gzip.open(tmp_path / "records.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(change(line)) + "\n" for line in lines)
        return load_run(tmp_path)

    return write


def test_a_grid_becomes_columns_by_budget(grid):
    board = make_board([grid()])
    labels = [column.label for column in board.columns]
    assert labels == ["Full cache", "snapkv 64", "snapkv 128", "snapkv 25%"]
    found = summarise(board)
    assert [found.averages[c.key, "all"].value for c in board.columns] == [100, 0, 100, 100]
    assert found.paired[board.columns[1].key, None, "all"].difference == -100
    assert check_protocols(board, allow_mixed=False) == ""


def test_a_damaged_line_is_named(grid):
    with pytest.raises(BenchError, match=r"records\.jsonl\.gz, line 1 is damaged: KeyError"):
        grid(lambda line: {name: value for name, value in line.items() if name != "options"})


@pytest.mark.slow
def test_the_stored_grid_gives_its_stored_numbers():
    board = make_board([load_run(STORED)])
    found = summarise(board)
    rows = json.loads((STORED / "summary.json").read_text())["rows"]
    assert len(rows) == len(board.columns)
    for row in rows:
        column = next(
            c for c in board.columns
            if c.method.identity == {name: row[name] for name in ("methods", "budget", "options")}
        )  # fmt: skip
        cell, score = row["lengths"]["2048"], found.scores[column.key, 2048, "all"]
        assert score.value == pytest.approx(cell["mean"])
        assert score.error == pytest.approx(cell["error"])
        if cell.get("vs_full"):
            pair = found.paired[column.key, 2048, "all"]
            assert pair.difference == pytest.approx(cell["vs_full"]["difference"])
