"""The steps of docs/writing-a-method.md, followed."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from blocks import ROOT

pytestmark = pytest.mark.versionless

PAGE = (ROOT / "docs" / "writing-a-method.md").read_text("utf-8")


def sections():
    return re.split(r"^## \d\. ", PAGE, flags=re.MULTILINE)[1:]


def files():
    """Return the code of the page by the file it belongs to."""
    found = {}
    for section in sections():
        names = re.findall(r"`((?:src|tests)/[\w/]+\.py)`", section)
        code = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        assert len(names) == len(code)
        found |= dict(zip(names, code, strict=True))
    return found


def run(*command, cwd, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_six_steps_and_under_sixty_lines():
    assert len(sections()) == 6
    lines = [line for code in files().values() for line in code.splitlines() if line.strip()]
    assert 30 < len(lines) < 60


def test_the_method_works(tmp_path):
    """As an installer would, but without one: the package's folder and an entry point."""
    package, site = tmp_path / "valuenorm", tmp_path / "site"
    run("kvdock", "new", "valuenorm", cwd=tmp_path)
    shutil.rmtree(package / "tests")
    for name, code in files().items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code)
    metadata = site / "kvdock_valuenorm-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvdock-valuenorm\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text("[kvdock.methods]\nvaluenorm = kvdock_valuenorm\n")
    path = (package / "src", site)
    assert "values of large norm" in run("kvdock", "show", "valuenorm", cwd=tmp_path, path=path)
    told = run("pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=package, path=path)
    assert "10 passed" in told
