"""Broken plugins beside the installed ones: they are named, and disable nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvdock import available

pytestmark = pytest.mark.versionless

PLUGINS = Path(__file__).parents[2] / "plugins"
INSTALLED = [id for id in available() if (PLUGINS / id).exists()]
BROKEN = {
    "raiser": ("raise RuntimeError('no such kernel')", "no such kernel"),
    "leaver": ("import sys; sys.exit(3)", "SystemExit"),
    "missing": (None, "No module named 'broken_missing'"),
    "empty": ("", "brings none"),
    "future": ("SPEC_VERSION = 99", "specification 99, this kvdock has 1"),
}
"""Method → source of its module, None where the entry point leads nowhere; what is told."""
USE = """
import sys
import kvdock
from kvdock.testing import Case, left_padded

case = Case(sys.argv[1])
model, (batch, _) = case.model(), left_padded((97, 70))
with case.attach(model) as dock:
    model.generate(**batch, max_new_tokens=4, do_sample=False)
    print(dock.report().bytes_held)
"""


@pytest.fixture
def surroundings(tmp_path):
    """Return the variables of a process that sees five broken distributions too."""
    for id, (source, _) in BROKEN.items():
        if source is not None:
            (tmp_path / f"broken_{id}.py").write_text(source)
        info = tmp_path / f"kvdock_{id}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvdock-{id}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvdock.methods]\n{id} = broken_{id}\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "400"}


def run(surroundings, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=surroundings, capture_output=True, text=True, timeout=300
    )


def test_all_are_listed_and_the_broken_named_with_the_reason(surroundings):
    listed = run(surroundings, "-m", "kvdock", "list")
    told = listed.stdout + listed.stderr
    for id in INSTALLED:
        assert id in told
    for id, (_, reason) in BROKEN.items():
        assert f"kvdock-{id}" in told and reason in told, told


@pytest.mark.parametrize("id", BROKEN)
def test_a_broken_one_asked_for_by_name_says_what_to_do(surroundings, id):
    shown = run(surroundings, "-m", "kvdock", "show", id)
    told = shown.stdout + shown.stderr
    assert shown.returncode != 0
    assert BROKEN[id][1] in told and f"kvdock-{id}" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize("id", INSTALLED)
def test_an_installed_one_works_beside_them(surroundings, id):
    used = run(surroundings, "-c", USE, id)
    assert used.returncode == 0, used.stderr
    assert int(used.stdout) > 0
