"""What the built wheels and sdists hold and require; `nox -s artifacts` runs it."""

import email
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.built, pytest.mark.versionless]

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
FOLDERS = {
    tomllib.loads(path.read_text())["project"]["name"]: path.parent
    for pattern in ("*/pyproject.toml", "plugins/*/pyproject.toml")
    for path in sorted(ROOT.glob(pattern))
}
METHODS = [name for name, folder in FOLDERS.items() if folder.parent.name == "plugins"]
SHIPPED = ("src", "tests", "scripts", "README.md", "LICENSE", "pyproject.toml")
every_distribution = pytest.mark.parametrize("name", FOLDERS)
every_method = pytest.mark.parametrize("name", METHODS)


def artifact(name, suffix):
    """Return the one file in dist/ that belongs to a distribution."""
    found = list(DIST.glob(f"{name.replace('-', '_')}-[0-9]*{suffix}"))
    assert len(found) == 1, f"{name}: found {found}; run: nox -s wheels"
    return found[0]


def module(name):
    return name.replace("-", "_")


def wheel(name):
    with zipfile.ZipFile(artifact(name, ".whl")) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


def sdist(name):
    with tarfile.open(artifact(name, ".tar.gz")) as archive:
        return {
            member.name.split("/", 1)[1]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


def metadata(name):
    (entry,) = [entry for entry in wheel(name) if entry.endswith(".dist-info/METADATA")]
    return email.message_from_string(wheel(name)[entry].decode())


def tracked(folder):
    """Return the committed files of a folder that a distribution ships."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    names = [name for name in listing.split("\0") if name.split("/")[0] in SHIPPED]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def test_every_distribution_is_built_and_nothing_else():
    assert len(FOLDERS) == len(METHODS) + 2
    assert len(list(DIST.iterdir())) == 2 * len(FOLDERS)


@every_distribution
def test_an_sdist_holds_what_is_committed(name):
    """All of it and nothing more, but for what the build itself adds."""
    found = sdist(name)
    assert found.pop("PKG-INFO")
    found.pop(".gitignore", None)
    assert found == tracked(FOLDERS[name])


@every_distribution
def test_a_wheel_holds_the_package_of_its_sdist(name):
    """Wheels are built from the sdists, so this is what anyone gets who builds one."""
    package = {k: v for k, v in wheel(name).items() if not k.split("/")[0].endswith(".dist-info")}
    source = {k.removeprefix("src/"): v for k, v in sdist(name).items() if k.startswith("src/")}
    assert package == source
    assert {path.split("/")[0] for path in package} == {module(name)}


@every_distribution
def test_a_wheel_is_typed_and_licensed(name):
    found = wheel(name)
    assert f"{module(name)}/py.typed" in found
    (licence,) = [entry for entry in found if entry.endswith(".dist-info/licenses/LICENSE")]
    assert found[licence] == (ROOT / "LICENSE").read_bytes() == sdist(name)["LICENSE"]
    told = metadata(name)
    assert (told["License-Expression"], told["License-File"]) == ("Apache-2.0", "LICENSE")
    assert told.get_payload() == (FOLDERS[name] / "README.md").read_text("utf-8")


def test_the_configs_of_the_benchmarks_are_in_the_wheel():
    configs = [entry for entry in wheel("kvdock-bench") if entry.endswith((".yaml", ".yml"))]
    assert len(configs) >= 4, configs


@every_method
def test_a_wheel_announces_its_method(name):
    id = name.removeprefix("kvdock-")
    found = wheel(name)
    (entry,) = [entry for entry in found if entry.endswith("/entry_points.txt")]
    assert found[entry].decode().split() == ["[kvdock.methods]", id, "=", module(name)]


@every_method
def test_a_wheel_requires_the_core_and_nothing_else(name):
    wanted = [line for line in metadata(name).get_all("Requires-Dist") if "extra ==" not in line]
    assert len(wanted) == 1
    assert re.fullmatch(r"kvdock\[hf\]<0\.2,>=0\.1", wanted[0])


@every_method
def test_extras_bring_what_the_project_declares(name):
    told = metadata(name)
    project = tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())["project"]
    declared = project.get("optional-dependencies", {})
    assert sorted(told.get_all("Provides-Extra", [])) == sorted(declared)
    lines = [line for line in told.get_all("Requires-Dist") if "extra ==" in line]
    assert len(lines) == sum(map(len, declared.values()))
    # what an extra brings is a kernel library, never another method
    assert not [line for line in lines if line.startswith("kvdock")]


def closure(*requirements):
    """Resolve requirements as an installer would; return the names of what it would install."""
    command = ["uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"]
    wishes = "\n".join(requirements)
    done = subprocess.run(
        [*command, "--python-version", "3.11"], input=wishes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {re.split(r"==| @ ", line)[0] for line in done.stdout.splitlines() if line}


@pytest.fixture(scope="module")
def core_closure():
    return closure(f"kvdock[hf] @ {artifact('kvdock', '.whl').as_uri()}")


@every_method
def test_a_method_brings_itself_and_what_the_core_brings(core_closure, name):
    # the core's wheel by path: it is on no index yet, and an index may have another one
    core = f"kvdock @ {artifact('kvdock', '.whl').as_uri()}"
    found = closure(core, f"{name} @ {artifact(name, '.whl').as_uri()}")
    assert found - core_closure == {name}
    assert {one for one in found if one.startswith("kvdock")} == {"kvdock", name}
    assert {"torch", "transformers", "pluggy", "typer"} <= found
