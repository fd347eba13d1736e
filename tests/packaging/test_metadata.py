"""What the metadata of our distributions must agree on."""

import re
import tomllib
from pathlib import Path

import pytest

import kvdock
from kvdock.hookspecs import COMMAND_GROUP, ENTRY_POINT_GROUP

pytestmark = pytest.mark.versionless

ROOT = Path(__file__).parents[2]
FOLDERS = {
    path.parent.relative_to(ROOT).as_posix(): path.parent
    for path in sorted(ROOT.glob("*/pyproject.toml"))
    + sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
PLUGINS = {name: folder for name, folder in FOLDERS.items() if name.startswith("plugins/")}
METADATA = {name: tomllib.loads((f / "pyproject.toml").read_text()) for name, f in FOLDERS.items()}
every_distribution = pytest.mark.parametrize("name", FOLDERS)
every_plugin = pytest.mark.parametrize("name", PLUGINS)


def test_the_distributions_are_found():
    assert {"core", "benchmarks", "plugins/snapkv", "plugins/streamingllm"} <= set(FOLDERS)


@every_distribution
def test_versions_move_in_lock_step(name):
    assert METADATA[name]["project"]["version"] == kvdock.__version__


@every_distribution
def test_the_licence_is_stated_and_included(name):
    project = METADATA[name]["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert (FOLDERS[name] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@every_distribution
def test_every_package_is_typed_and_has_a_readme(name):
    packages = [
        path for path in (FOLDERS[name] / "src").iterdir() if (path / "__init__.py").exists()
    ]
    assert len(packages) == 1
    assert (packages[0] / "py.typed").exists()
    assert METADATA[name]["project"]["readme"] == "README.md"
    assert len((FOLDERS[name] / "README.md").read_text().splitlines()) > 3


@every_distribution
def test_metadata_stands_alone(name):
    """A source table or a workspace would make the distribution uninstallable on its own."""
    assert "uv" not in METADATA[name].get("tool", {})
    assert METADATA[name]["build-system"]["build-backend"] == "hatchling.build"
    assert METADATA[name]["project"]["requires-python"] == ">=3.11"


@every_plugin
def test_directory_distribution_module_and_entry_point_bear_one_name(name):
    id = FOLDERS[name].name
    project = METADATA[name]["project"]
    assert project["name"] == f"kvdock-{id}"
    assert project["entry-points"] == {ENTRY_POINT_GROUP: {id: f"kvdock_{id}"}}
    assert (FOLDERS[name] / "src" / f"kvdock_{id}" / "__init__.py").exists()
    assert list((FOLDERS[name] / "tests").glob("test_*.py"))


@every_plugin
def test_a_plugin_names_an_environment_that_exists(name):
    environment = METADATA[name]["tool"]["kvdock"]["environment"]
    assert (ROOT / "envs" / environment / "constraints.txt").exists()


@every_plugin
def test_a_plugin_leaves_the_ranges_of_torch_and_transformers_to_the_core(name):
    dependencies = METADATA[name]["project"]["dependencies"]
    assert "kvdock[hf]>=0.1,<0.2" in dependencies
    assert not [line for line in dependencies if re.match(r"torch\b|transformers\b", line)]


def test_the_core_is_light_without_its_extra():
    project = METADATA["core"]["project"]
    names = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    assert sorted(names) == ["pluggy", "typer"]
    extra = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["hf"]]
    assert extra == ["torch", "transformers"]


def test_the_commands_of_the_benchmarks_are_found_by_the_core():
    assert COMMAND_GROUP in METADATA["benchmarks"]["project"]["entry-points"]


def test_the_core_states_a_lowest_version_that_nox_can_test():
    for line in METADATA["core"]["project"]["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?", line), line
