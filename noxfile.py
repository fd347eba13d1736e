"""How kvdock is tested, measured and packaged: `nox --list` is the manual, `nox` runs the tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent.resolve()
TOOLS = nox.project.load_toml(ROOT / "pyproject.toml")
ENVIRONMENTS = sorted(path.parent.name for path in ROOT.glob("envs/*/requirements.in"))
COMPANIONS = {
    # a sparse prefill is also tested together with methods that compress the cache after it
    "flexprefill": ("kivi", "snapkv", "streamingllm"),
    "xattention": ("kivi", "snapkv", "streamingllm"),
}
FLOOR = ("pluggy==1.6.0", "typer==0.26.0")
"""The lowest versions that core/pyproject.toml allows."""

# without byte code every process parses torch anew, which doubles the time of the tests
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# a folder of wheels that is meant for pip serves uv as well
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the workers of pytest share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
WORKERS = ("-n", "2")


def metadata(directory: Path) -> dict[str, Any]:
    """Read the pyproject.toml of one distribution."""
    return nox.project.load_toml(directory / "pyproject.toml")


PLUGINS = {
    path.parent.name: metadata(path.parent)["tool"]["kvdock"]["environment"]
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}


def group(*names: str) -> tuple[str, ...]:
    """Return the requirements of dependency groups of the root pyproject.toml."""
    return nox.project.dependency_groups(TOOLS, *names)


def plugins_of(environment: str) -> list[str]:
    """List the plugins that are tested in an environment."""
    own = [id for id, home in PLUGINS.items() if home == environment]
    return sorted({*own, *COMPANIONS.get(environment, ())})


def packages_of(environment: str) -> list[Path]:
    """List the folders of our distributions that an environment holds."""
    plugins = [ROOT / "plugins" / id for id in plugins_of(environment)]
    benchmarks = [ROOT / "benchmarks"] if environment == "general" else []
    return [ROOT / "core", *plugins, *benchmarks]


def pins(environment: str) -> list[str]:
    """Return the installer's arguments that pin an environment.

    KVDOCK_GPU names packages of gpu.in to install too, such as "flash-attn-4".
    """
    folder = ROOT / "envs" / environment
    kernels = os.environ.get("KVDOCK_GPU", "").split()
    return ["-c", f"{folder}/constraints.txt", "-r", f"{folder}/requirements.in", *kernels]


def install(session: nox.Session, environment: str, *extra: str) -> None:
    """Install an environment with our distributions in editable form."""
    extras = {"benchmarks": "[longbench]"}
    editable = [
        part
        for folder in packages_of(environment)
        for part in ("-e", f"{folder}{extras.get(folder.name, '')}")
    ]
    session.install(*pins(environment), *editable, *extra)


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Check style and format of the whole repository; `-- --fix` repairs what can be repaired."""
    session.install(*group("lint"))
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--diff"]), ".")


@nox.session(tags=["check"], reuse_venv=True)
def types(session: nox.Session) -> None:
    """Check types: strictly in the core, loosely in plugins and benchmarks."""
    install(session, "general", *group("types"))
    session.run("mypy", "-n", "2", "--strict", "core/src/kvdock")
    sources = [f"{folder}/src" for folder in packages_of("general")[1:]]
    session.run("mypy", "-n", "2", *sources)


@nox.session(tags=["test"])
@nox.parametrize("versions", ["floor", "latest"])
def core(session: nox.Session, versions: str) -> None:
    """Test the core alone, without torch, on the lowest and the newest dependencies."""
    session.install("-e", "core", *group("test"), *(FLOOR if versions == "floor" else ()))
    absent = "from importlib.util import find_spec; assert find_spec('torch') is None"
    session.run("python", "-c", absent)
    session.run("pytest", "core/tests", "--ignore=core/tests/torch", *session.posargs)


def add_tests(environment: str) -> None:
    """Define the session that tests one environment."""

    @nox.session(name=f"tests-{environment}", tags=["env"], reuse_venv=True)
    def tests(session: nox.Session) -> None:
        install(session, environment, *group("test"))
        folders = [f"{folder}/tests" for folder in packages_of(environment)]
        # what no version of transformers can change is tested in one environment
        chosen = () if environment == "general" else ("-m", "not slow and not versionless")
        session.run("pytest", *WORKERS, *chosen, *folders, "tests", *session.posargs)

    tests.__doc__ = f"Test the core and the methods of envs/{environment} on its pinned versions."


for name in ENVIRONMENTS:
    add_tests(name)


@nox.session(tags=["test"], reuse_venv=True)
def kernels(session: nox.Session) -> None:
    """Run every package's Triton kernels in Triton's interpreter, against float64."""
    lines = (ROOT / "envs" / "general" / "gpu.in").read_text().splitlines()
    triton = [line for line in lines if line.startswith("triton==")]
    plugins = [part for id in sorted(PLUGINS) for part in ("-e", f"plugins/{id}")]
    session.install(*pins("general"), "-e", "core", *plugins, *group("test"), *triton)
    folders = ["core/tests", *(f"plugins/{id}/tests" for id in sorted(PLUGINS))]
    # a file's tests read what one run of its kernels left, so they stay together
    together = (*WORKERS, "--dist", "loadfile")
    session.run("pytest", *together, "-m", "interpret", *folders, *session.posargs)


@nox.session(default=False, tags=["env"], reuse_venv=True)
def exhaustive(session: nox.Session) -> None:
    """Run the long products and the full counts that the default sessions leave out."""
    install(session, "general", *group("test"))
    folders = [f"{folder}/tests" for folder in packages_of("general")]
    session.run("pytest", *WORKERS, "-m", "slow and not vllm", *folders, "tests", *session.posargs)


@nox.session(default=False, reuse_venv=True, tags=["test"])
def browser(session: nox.Session) -> None:
    """Check the reports in headless Chromium: the system's, or the one KVDOCK_CHROMIUM names."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (os.environ.get("KVDOCK_CHROMIUM") or any(map(shutil.which, names))):
        session.error("No chromium found: install it (Debian: chromium) or set KVDOCK_CHROMIUM.")
    install(session, "general", *group("test", "browser"))
    session.run("pytest", "-m", "slow", "benchmarks/tests/report/test_browser.py", *session.posargs)


@nox.session(default=False, reuse_venv=True)
def demo(session: nox.Session) -> None:
    """Compare SnapKV and StreamingLLM with the full cache on a small real model, in minutes."""
    install(session, "general")
    settings = ["--model_path", "smollm2-135m", "--cfg_path", "demo", "--budget", "128"]
    methods = ["--acceleration", "SnapKV", "StreamingLLM"]
    # this model writes every digit as a token, so a number is wider than the paper's pooling of 7
    options = ["--set", "snapkv.kernel=21"]
    session.run("kvdock", "bench", *settings, *methods, *options, *session.posargs)


@nox.session(name="vllm-env", venv_backend="uv", default=False, reuse_venv=True)
def vllm_env(session: nox.Session) -> None:
    """Make vLLM's environment, for `kvdock bench --server vllm`; `-- gpu` for NVIDIA GPUs."""
    kind = "gpu" if "gpu" in session.posargs else "cpu"
    folder = ROOT / "envs" / "vllm"
    pinned = ["-c", f"{folder}/{kind}-constraints.txt", "-r", f"{folder}/{kind}.in"]
    if kind == "cpu":
        pinned += ["--override", f"{folder}/cpu-overrides.txt"]
        if "UV_FIND_LINKS" not in os.environ:
            pinned += ["--torch-backend", "cpu"]
    session.install(*pinned)
    session.log(f"kvdock bench finds {session.bin}/python here; elsewhere: --vllm_python")


@nox.session(default=False, reuse_venv=True, requires=["vllm-env"])
def vllm(session: nox.Session) -> None:
    """Compare vLLM's greedy answers with transformers' on the same prompts, for real."""
    install(session, "general", *group("test"))
    session.run("pytest", "-m", "vllm", "benchmarks/tests/runner")


@nox.session(default=False, reuse_venv=True)
def harness(session: nox.Session) -> None:
    """Run lm-eval's tasks through the bridge, offline."""
    # without constraints: its dependencies need older releases than the benchmarks' own
    editable = [part for folder in packages_of("general") for part in ("-e", str(folder))]
    pinned = ("-r", f"{ROOT}/envs/general/requirements.in", "-e", "benchmarks[lm-eval]")
    session.install(*pinned, *editable, *group("test"))
    session.run("pytest", "-m", "harness", "benchmarks/tests/harness", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Write the READMEs' table of methods from the plugins' records and the stored results."""
    session.install("-e", "core")
    session.run("python", "tests/docs/methods_table.py")


@nox.session(default=False, tags=["drift"])
def latest(session: nox.Session) -> None:
    """Test the general methods on the newest releases the ranges allow, without pins."""
    editable = [part for folder in packages_of("general") for part in ("-e", str(folder))]
    session.install("--upgrade", *editable, "accelerate", *group("test"))
    folders = [f"{folder}/tests" for folder in packages_of("general")]
    session.run("pytest", *folders, "tests", *session.posargs)


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


@nox.session(default=False, tags=["lock"])
@nox.parametrize("environment", ENVIRONMENTS)
def lock(session: nox.Session, environment: str) -> None:
    """Compile the constraints of the environments; `-- --upgrade` also raises existing pins."""
    session.install("uv")
    compile_pins(session, environment, ROOT / "envs" / environment / "constraints.txt")


@nox.session(name="lock-check", default=False, tags=["lock"])
@nox.parametrize("environment", ENVIRONMENTS)
def lock_check(session: nox.Session, environment: str) -> None:
    """Fail where the constraints no longer follow from the requirements."""
    session.install("uv")
    committed = ROOT / "envs" / environment / "constraints.txt"
    fresh = Path(session.create_tmp()) / "constraints.txt"
    shutil.copy(committed, fresh)
    compile_pins(session, environment, fresh)
    if fresh.read_text() != committed.read_text():
        session.error(f"{committed} is out of date; run: nox -s lock")


@nox.session(name="lock-vllm", default=False, tags=["lock"])
@nox.parametrize("kind", ["cpu", "gpu"])
def lock_vllm(session: nox.Session, kind: str) -> None:
    """Compile the constraints of vLLM's environment."""
    session.install("uv")
    folder = ROOT / "envs" / "vllm"
    overrides = ["--override", f"{folder}/cpu-overrides.txt"] if kind == "cpu" else []
    target = folder / f"{kind}-constraints.txt"
    compile_file(session, target, f"{folder}/{kind}.in", *overrides)


@nox.session(default=False, tags=["package"])
def wheels(session: nox.Session) -> None:
    """Build the wheel and sdist of every distribution into dist/ and check their metadata."""
    session.install("build[uv]", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for folder in (ROOT / "core", *ROOT.glob("plugins/*/"), ROOT / "benchmarks"):
        build = ("python", "-m", "build", "--installer", "uv", "--outdir", "dist")
        session.run(*build, str(folder), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(ROOT.glob("dist/*"))))


@nox.session(default=False, tags=["package"], requires=["wheels"])
@nox.parametrize("method", sorted(PLUGINS))
def isolated(session: nox.Session, method: str) -> None:
    """Test one method from its wheel, with nothing of ours beside it but the core."""
    # by path: an installer may take an older build of the same version from its cache
    built = [*ROOT.glob("dist/kvdock-*.whl"), *ROOT.glob(f"dist/kvdock_{method}-*.whl")]
    session.install(*pins(PLUGINS[method]), *map(str, built), *group("test"))
    session.chdir(session.create_tmp())
    listing = (
        "from importlib.metadata import distributions;"
        "found = sorted(d.name for d in distributions() if d.name.startswith('kvdock'));"
        f"assert found == ['kvdock', 'kvdock-{method}'], found"
    )
    session.run("python", "-c", listing)
    session.run("kvdock", "doctor", method)
    config = ("-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT))
    session.run("pytest", *config, f"{ROOT}/plugins/{method}/tests", *session.posargs)
