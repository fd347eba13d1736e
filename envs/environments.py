"""What the environments hold and how they are pinned; read by the noxfile."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parents[1].resolve()
ENVIRONMENTS = sorted(path.parent.name for path in ROOT.glob("envs/*/requirements.in"))
COMPANIONS = {
    # a sparse prefill is also tested together with methods that compress the cache after it
    "flexprefill": ("kivi", "snapkv", "streamingllm"),
    "xattention": ("kivi", "snapkv", "streamingllm"),
}


def prepare_process() -> None:
    """Set the variables that every session inherits."""
    # without byte code every process parses torch anew, which doubles the time of the tests
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # a folder of wheels that is meant for pip serves uv as well
    if "PIP_FIND_LINKS" in os.environ:
        os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # the workers of pytest share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def metadata(directory: Path) -> dict[str, Any]:
    """Read the pyproject.toml of one distribution."""
    return nox.project.load_toml(directory / "pyproject.toml")


PLUGINS = {
    path.parent.name: metadata(path.parent)["tool"]["kvdock"]["environment"]
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
FOLDERS = (ROOT / "core", *(ROOT / "plugins" / id for id in PLUGINS), ROOT / "benchmarks")
"""Where our distributions are made from."""


def group(*names: str) -> tuple[str, ...]:
    """Return the requirements of dependency groups of the root pyproject.toml."""
    return nox.project.dependency_groups(metadata(ROOT), *names)


def floors(extra: str | None = None) -> list[str]:
    """Return the core's dependencies, or an extra's, each at the lowest version it allows."""
    project = metadata(ROOT / "core")["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [re.sub(r">=([\d.]+).*", r"==\1", line) for line in lines]


def plugins_of(environment: str) -> list[str]:
    """List the plugins that are tested in an environment."""
    own = [id for id, home in PLUGINS.items() if home == environment]
    return sorted({*own, *COMPANIONS.get(environment, ())})


def packages_of(environment: str) -> list[Path]:
    """List the folders of our distributions that an environment holds."""
    plugins = [ROOT / "plugins" / id for id in plugins_of(environment)]
    benchmarks = [ROOT / "benchmarks"] if environment == "general" else []
    return [ROOT / "core", *plugins, *benchmarks]


def tests_of(folders: list[Path]) -> list[str]:
    """Return the tests of some of our distributions and those that concern all of them."""
    return [*(f"{folder}/tests" for folder in folders), "tests"]


def editable(*folders: Path, extras: str = "") -> list[str]:
    """Return the installer's arguments for folders in editable form; `extras` for benchmarks."""
    wanted = {"benchmarks": extras}
    return [part for folder in folders for part in ("-e", f"{folder}{wanted.get(folder.name, '')}")]


def pins(environment: str) -> list[str]:
    """Return the installer's arguments that pin an environment.

    KVDOCK_GPU names packages of gpu.in to install too, such as "flash-attn-4".
    """
    folder = ROOT / "envs" / environment
    kernels = os.environ.get("KVDOCK_GPU", "").split()
    return ["-c", f"{folder}/constraints.txt", "-r", f"{folder}/requirements.in", *kernels]


def pinned(environment: str, package: str) -> str:
    """Return the requirement that pins a package in an environment."""
    lines = (ROOT / "envs" / environment / "constraints.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{package}==")]
    return line


def install(
    session: nox.Session, environment: str, *extra: str, extras: str = "[longbench,peft]"
) -> None:
    """Install an environment with our distributions in editable form."""
    ours = editable(*packages_of(environment), extras=extras)
    session.install(*pins(environment), *ours, *extra)


def compile_pins(session: nox.Session, environment: str, target: Path) -> None:
    """Write the pins of an environment to `target`; pins already there stay where they can."""
    requirements = [*group("test")]
    for folder in packages_of(environment):
        project = metadata(folder)["project"]
        requirements += project["dependencies"]
        requirements += project.get("optional-dependencies", {}).get("hf", [])
    ours = Path(session.create_tmp()) / "project.in"
    third_party = sorted({line for line in requirements if not line.startswith("kvdock")})
    ours.write_text("\n".join(third_party) + "\n")
    folder = ROOT / "envs" / environment
    compile_file(session, target, f"{folder}/requirements.in", f"{folder}/gpu.in", str(ours))


def compile_file(session: nox.Session, target: Path, *arguments: str) -> None:
    """Compile requirements to `target`.

    The process gets almost no variables, because a folder of wheels or another index named in
    one of them would leave its traces in the file.
    """
    kept = ("PATH", "HOME", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TMPDIR")
    session.run(
        *("uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate"),
        *("--python-version", "3.11", "--python-platform", "linux"),
        *("--output-file", str(target), *session.posargs, *arguments),
        env={name: os.environ[name] for name in kept if name in os.environ},
        include_outer_env=False,
        silent=True,
    )
