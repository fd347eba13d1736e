"""What `kvdock new` copies is plugins/l2compress, and what it makes can be installed and used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvdock.scaffold import template_files

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT / "plugins" / "l2compress"
OWN = {"README.md", "tests/test_contract.py"}
"""Texts of the template alone; here the contract is tested in tests/contract."""
LEFT_OUT = {"README.md", "tests/test_selection.py"}
MARKER = "pytestmark = pytest.mark.versionless\n\n"
"""Says something of this repository's sessions only."""


def original():
    files = [path for path in ORIGINAL.rglob("*") if path.is_file()]
    names = [path.relative_to(ORIGINAL).as_posix() for path in files]
    shipped = [name for name in names if "__pycache__" not in name and ".egg-info" not in name]
    return {name: (ORIGINAL / name).read_text("utf-8").replace(MARKER, "") for name in shipped}


def test_the_template_equals_the_plugin():
    template = {name: text for name, text in template_files().items() if name not in OWN}
    plugin = {name: text for name, text in original().items() if name not in LEFT_OUT}
    assert sorted(template) == sorted(plugin)
    stale = [name for name, text in plugin.items() if template[name] != text]
    assert stale == [], (
        f"copy {stale} from plugins/l2compress to core/src/kvdock/template, with '.template' behind"
        " the name and without the marker 'versionless'"
    )


def test_the_card_has_the_headings_of_the_others():
    def headings(text):
        return re.findall(r"^## (.*)$", text, re.MULTILINE)

    card = template_files()["README.md"]
    assert headings(card) == headings((ORIGINAL / "README.md").read_text("utf-8"))
    # numbers of another method would be a false claim
    assert not re.search(r"\d+(\.\d+)? ?(%|GiB|ms)", card)


@pytest.mark.slow
def test_a_new_method_installs_and_keeps_the_contract(tmp_path):
    site = tmp_path / "site"

    def run(*command):
        paths = filter(None, (str(site), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = sys.executable
    kvdock = (python, "-m", "kvdock")
    run(*kvdock, "new", "demo-method")
    # an environment that uv made has no pip
    uv = shutil.which("uv")
    installer = (
        (uv, "pip", "install", "--python", python) if uv else (python, "-m", "pip", "install")
    )
    run(*installer, "--no-deps", "--target", str(site), "./demo-method")
    shutil.rmtree(tmp_path / "demo-method" / "src")
    assert re.search(r"^demomethod +DemoMethod +eviction", run(*kvdock, "list"), re.MULTILINE)
    report = run(*kvdock, "doctor", "demo-method")
    assert "Contract of demomethod" in report
    assert report.count("llama: ") == 9
    told = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "demo-method/tests")
    assert re.search(r"^\d{3} passed", told, re.MULTILINE)
