"""Committed files work on any machine: no trace of the one they were written on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).parents[2]
# written in parts, so that this file does not find itself
TRACES = re.compile(
    "|".join(
        (r"\+" + "cpu", "file" + ":/", r"(?<![\w.~}])/(?:" + r"root|opt|home|work|mnt|Users)/")
    )
)


URL = re.compile(r"\b(?:https?|ftp|ssh|git)://(?:[^/\s@\"']*@)?([\w.-]+(?::\d+)?)")
INDEX = re.compile("--" + r"(?:extra-)?index-url|--" + "trusted-host|--" + r"find-links[ =]\S*/")
PUBLIC = re.compile(r"([\w-]+\.)+(?!local$|internal$|lan$|corp$|intranet$|home$)[a-z]{2,}")


def hosts(text):
    """List the hosts that only some network knows: no domain, an address, or a port of its own."""
    # the port for discarding what arrives, where a test wants nothing to answer
    found = [match[1].rstrip(".") for match in URL.finditer(text)]
    return [host for host in found if not PUBLIC.fullmatch(host) and host != "127.0.0.1:9"]


def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name]


def traces(text):
    return [match[0] for match in TRACES.finditer(text)]


def test_no_tracked_file_bears_traces_of_a_machine():
    found = {}
    for path in tracked():
        # a file deleted but not committed yet is still listed
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if hits := traces(text) + hosts(text) + INDEX.findall(text):
            found[path.relative_to(ROOT).as_posix()] = hits
    assert found == {}


def test_no_output_is_tracked():
    outputs = re.compile(r"(^|/)(runs|dist|\.nox|__pycache__|[^/]+\.egg-info)/")
    assert [str(path) for path in tracked() if outputs.search(str(path.relative_to(ROOT)))] == []


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("torch==2.13.0+" + "cpu", True),
        ("pip install file" + ":///x.whl", True),
        ("cd /ho" + "me/someone", True),
        ("'/op" + "t/wheels'", True),
        ("core/tests/home/x.py and https://example.org/home/", False),
        ("a file: named so, and /nowhere/else", False),
    ],
)
def test_the_search_finds_what_it_should(text, hit):
    assert bool(traces(text)) is hit


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://arxiv.org/abs/1 and https://pluggy.readthedocs.io.", []),
        ("http://" + "mirror/simple", ["mirror"]),
        ("http://" + "10.0.0.7/simple", ["10.0.0.7"]),
        ("https:" + "//user:secret@pypi.corp/simple", ["pypi.corp"]),
        ("https://" + "example.org:8080/x", ["example.org:8080"]),
    ],
)
def test_the_search_finds_hosts_of_one_network(text, found):
    assert hosts(text) == found
