"""Fake distributions, built on the fly, so that discovery is tested on what it really reads."""

import os
import sys
import textwrap
from importlib.metadata import entry_points

import pytest
from hypothesis import settings

from kvdock.hookspecs import COMMAND_GROUP, ENTRY_POINT_GROUP
from kvdock.registry import Host

# a loaded machine is slow, not wrong
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

GOOD_PLUGIN = """
    from kvdock import Method, Paper, hookimpl

    SPEC_VERSION = 1

    @hookimpl
    def kvdock_methods():
        return [
            Method(
                id="{id}",
                name="{name}",
                kind="eviction",
                factory="{module}_policy:Policy",
                options="{module}_policy:PolicyOptions",
                paper=Paper("A paper on {name}", "ICML 2026", "https://example.org/{id}"),
                summary="Keep what matters.",
            )
        ]
"""
POLICY = """
    from dataclasses import dataclass
    from kvdock import Options, option

    @dataclass(frozen=True, slots=True)
    class PolicyOptions(Options):
        window: int = option(32, help="last queries that vote", symbol="α", ge=1)
        pooling: str = option("avg", help="how votes are smoothed", choices=("avg", "max"))

    class Policy:
        def __init__(self, options):
            self.options = options
"""


class Site:
    """A folder on sys.path into which distributions are written."""

    def __init__(self, root):
        self.root = root
        self.hidden = ",".join(
            entry.name
            for group in (ENTRY_POINT_GROUP, COMMAND_GROUP)
            for entry in entry_points(group=group)
        )

    def add(self, dist, *, version="1.0", modules=None, methods=None, commands=None):
        for name, source in (modules or {}).items():
            (self.root / f"{name}.py").write_text(textwrap.dedent(source))
        info = self.root / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = []
        for group, entries in ((ENTRY_POINT_GROUP, methods), (COMMAND_GROUP, commands)):
            lines += [f"[{group}]", *(f"{k} = {v}" for k, v in (entries or {}).items())]
        (info / "entry_points.txt").write_text("\n".join(lines))

    def add_method(self, id, *, name=None, dist=None, version="1.0"):
        module = f"fake_{id}"
        good = GOOD_PLUGIN.format(id=id, name=name or id, module=module)
        self.add(
            dist or f"kvdock-{id}",
            version=version,
            modules={module: good, f"{module}_policy": POLICY},
            methods={id: module},
        )

    def add_broken(self, id, source="raise ImportError('no kernel library')"):
        self.add(f"kvdock-{id}", modules={f"fake_{id}": source}, methods={id: f"fake_{id}"})

    def environ(self, **extra):
        """Return the variables under which only this folder's plugins are seen."""
        hidden = ",".join(filter(None, (self.hidden, extra.pop("KVDOCK_DISABLE", ""))))
        return {"KVDOCK_DISABLE": hidden, **extra}

    def host(self, **extra):
        return Host(environ=self.environ(**extra))

    def process_environ(self, **extra):
        paths = filter(None, (str(self.root), os.environ.get("PYTHONPATH")))
        own = {"PYTHONPATH": os.pathsep.join(paths), **self.environ(**extra)}
        return {**os.environ, **own}


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]
