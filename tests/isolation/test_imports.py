"""Which package imports which: read from the source, so nothing needs to be installed."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
IMPORT_NAMES = {
    "flash-attn-4": "flash_attn",
    "flashinfer-python": "flashinfer",
    "pyyaml": "yaml",
}
NAME = re.compile(r"[A-Za-z][\w.-]*")
PROGRAMS = {"src/kvdock_bench/vllm/worker.py": "vllm"}
"""Programs that run in an environment of their own, and which."""
HEAVY = {"torch", "transformers", "triton", "flash_attn", "flashinfer", "numpy"}


def imports(source, *, at_import_time=False):
    """Return the top-level names a source imports, optionally only those that run on import."""
    return {name for name, _ in walk(ast.parse(source), at_import_time)}


def walk(node, at_import_time):
    for child in ast.iter_child_nodes(node):
        if at_import_time and isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            continue
        if (
            at_import_time
            and isinstance(child, ast.If)
            and "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], child) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield child.module.split(".")[0], child
        yield from walk(child, at_import_time)


def declared(project):
    """Return the import names of what a project's metadata declares, extras included."""
    requirements = list(project.get("dependencies", []))
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    names = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)\s*(\[[\w,\s-]*\])?", requirement).groups()
        names.add(IMPORT_NAMES.get(name.lower(), name.lower().replace("-", "_")))
        if name == "kvdock" and "hf" in (extras or ""):
            names |= {"torch", "transformers"}
    return names


def pinned(environment):
    """Return the names that an environment's requirements name."""
    lines = [
        line
        for path in (ROOT / "envs" / environment).glob("*.in")
        for line in path.read_text().splitlines()
    ]
    return {match[0].lower().replace("-", "_") for line in lines if (match := NAME.match(line))}


def undeclared(folder):
    """List what the sources under a folder import without declaring it."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    own = {path.name for path in (folder / "src").iterdir()}
    allowed = sys.stdlib_module_names | own | declared(project)
    found = []
    for path in sorted((folder / "src").rglob("*.py")):
        place = path.relative_to(folder).as_posix()
        # a program for another interpreter has that environment's packages, and none of ours
        serves = sys.stdlib_module_names | pinned(PROGRAMS[place]) if place in PROGRAMS else allowed
        found += [f"{place}: {name}" for name in sorted(imports(path.read_text()) - serves)]
    return found


def imports_of(folder, **how):
    return set().union(*(imports(path.read_text(), **how) for path in folder.rglob("*.py")))


@pytest.mark.parametrize("id", PLUGINS)
def test_a_plugin_imports_only_itself_the_core_and_what_it_declares(id):
    assert undeclared(ROOT / "plugins" / id) == []


def test_the_benchmarks_import_only_what_they_declare():
    assert undeclared(ROOT / "benchmarks") == []


def test_the_core_imports_no_package_that_docks_to_it():
    names = imports_of(ROOT / "core" / "src")
    assert "torch" in names
    assert [name for name in names if name.startswith("kvdock_")] == []


def test_the_benchmarks_know_no_method():
    names = imports_of(ROOT / "benchmarks" / "src")
    assert [name for name in names if name.startswith("kvdock_")] in ([], ["kvdock_bench"])


@pytest.mark.parametrize("id", PLUGINS)
def test_importing_the_top_module_of_a_plugin_costs_nothing(id):
    source = (ROOT / "plugins" / id / "src" / f"kvdock_{id}" / "__init__.py").read_text()
    names = imports(source, at_import_time=True)
    assert names & HEAVY == set()
    # its own modules may import torch, so they are loaded by name only
    assert f"kvdock_{id}" not in names


def test_the_scan_finds_a_neighbour_and_an_undeclared_package(tmp_path):
    package = tmp_path / "src" / "kvdock_fake"
    package.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "kvdock-fake"\n'
        'dependencies = ["kvdock[hf]>=0.1,<0.2", "pyyaml"]\n'
        '[project.optional-dependencies]\ngpu = ["flash-attn-4==4.0"]\n'
    )
    (package / "__init__.py").write_text(
        "import os, torch, yaml\nfrom kvdock import Method\nfrom . import policy\n"
    )
    (package / "policy.py").write_text(
        "def late():\n    import kvdock_snapkv.policy\n    import numpy as np\n"
        "    from flash_attn.cute import interface\n    from kvdock_fake import x\n"
    )
    found = undeclared(tmp_path)
    assert found == ["src/kvdock_fake/policy.py: kvdock_snapkv", "src/kvdock_fake/policy.py: numpy"]


def test_the_scan_tells_imports_that_run_at_import_time():
    source = (
        "import os\nif TYPE_CHECKING:\n    import torch\n"
        "try:\n    import numpy\nexcept ImportError:\n    pass\n"
        "class A:\n    import json\n    def late(self):\n        import triton\n"
    )
    assert imports(source, at_import_time=True) == {"os", "numpy", "json"}
    assert imports(source) == {"os", "torch", "numpy", "json", "triton"}
