"""How kvdock is tested, measured and packaged: `nox --list` is the manual, `nox` runs the tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "envs"))
from environments import (
    ENVIRONMENTS,
    FOLDERS,
    PLUGINS,
    ROOT,
    compile_file,
    compile_pins,
    editable,
    floors,
    group,
    install,
    packages_of,
    pinned,
    pins,
    prepare_process,
    tests_of,
)

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True

WORKERS = ("-n", "2", "--dist", "worksteal")
"""Each worker begins with its own half, so that what a file's tests share is made once."""
UNPINNED = (
    "--deselect",
    "tests/packaging/test_environments.py::test_this_process_runs_in_one_of_the_environments_or_none",
)
"""Where nothing is pinned, no pin is met."""

prepare_process()


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
    session.install(*pins("general"), *editable(*FOLDERS), *group("types"))
    session.run("mypy", "-n", "2", "core/src/kvdock", *(f"{path}/src" for path in FOLDERS[1:]))


@nox.session(tags=["test"])
@nox.parametrize("versions", ["floor", "latest"])
def core(session: nox.Session, versions: str) -> None:
    """Test the core alone, without torch, on the lowest and the newest dependencies."""
    session.install("-e", "core", *group("test"), *(floors() if versions == "floor" else ()))
    absent = "from importlib.util import find_spec; assert find_spec('torch') is None"
    session.run("python", "-c", absent)
    session.run("pytest", "core/tests", "--ignore=core/tests/torch", *session.posargs)


def add_tests(environment: str) -> None:
    """Define the session that tests one environment."""

    @nox.session(name=f"tests-{environment}", tags=["env"], reuse_venv=True)
    def tests(session: nox.Session) -> None:
        install(session, environment, *group("test"))
        # what no version of transformers can change is tested in one environment
        once = (
            "-m",
            "not slow and not versionless and not general",
            "--ignore-glob=core/tests/test_*.py",
        )
        chosen = () if environment == "general" else once
        folders = tests_of(packages_of(environment))
        session.run("pytest", *WORKERS, *chosen, *folders, *session.posargs)

    tests.__doc__ = f"Test the core and the methods of envs/{environment} on its pinned versions."


for name in ENVIRONMENTS:
    add_tests(name)


@nox.session(tags=["test"], reuse_venv=True)
def kernels(session: nox.Session) -> None:
    """Run every package's Triton kernels in Triton's interpreter, against float64."""
    triton = pinned("general", "triton")
    session.install(*pins("general"), *editable(*FOLDERS[:-1]), *group("test"), triton)
    # the longest files come first, so that no worker ends with one
    folders = [f"{folder}/tests" for folder in (*FOLDERS[1:-1], FOLDERS[0])]
    # a file's tests read what one run of its kernels left, so they stay together
    together = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    session.run("pytest", *together, "-m", "interpret", *folders, *session.posargs)


@nox.session(default=False, tags=["env"], reuse_venv=True)
def exhaustive(session: nox.Session) -> None:
    """Run the long products and the full counts that the default sessions leave out."""
    install(session, "general", *group("test"), extras="[longbench,peft,ray]")
    chosen = ("-m", "slow and not vllm and not built")
    session.run("pytest", *WORKERS, *chosen, *tests_of(packages_of("general")), *session.posargs)


@nox.session(default=False, reuse_venv=True, tags=["test"])
def fuzz(session: nox.Session) -> None:
    """Feed readers and writers 500 hostile cases each; the last test counts them."""
    install(session, "general", *group("test"))
    # one process, so that one count holds them all
    wanted = {"KVDOCK_FUZZ": "500", "KVDOCK_FUZZ_TOTAL": "10000"}
    files = map(str, sorted(Path("benchmarks/tests/safety").glob("test_fuzz*.py")))
    session.run("pytest", "-rP", *files, *session.posargs, env=wanted)


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
    ours = editable(*packages_of("general"), extras="[lm-eval]")
    session.install("-r", f"{ROOT}/envs/general/requirements.in", *ours, *group("test"))
    session.run("pytest", "-m", "harness", "benchmarks/tests/harness", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Write the READMEs' table of methods from the plugins' records and the stored results."""
    session.install("-e", "core")
    session.run("python", "tests/docs/methods_table.py")


@nox.session(default=False, tags=["drift"])
def latest(session: nox.Session) -> None:
    """Test everything on the newest releases that the ranges allow, without pins.

    All but torch, which stays as it is pinned; `-- torch` takes the newest of it too, with
    gigabytes of CUDA libraries unless UV_TORCH_BACKEND=cpu is set.
    """
    torch, arguments = torch_pin(session.posargs)
    newest = [*editable(*FOLDERS, extras="[longbench]"), "accelerate", *group("test")]
    session.install("--upgrade", *torch, *newest)
    session.run("pytest", *WORKERS, *UNPINNED, *tests_of(FOLDERS), *arguments)


@nox.session(default=False, tags=["drift"])
def minimums(session: nox.Session) -> None:
    """Test the core and the methods on the lowest versions that the core's metadata allow.

    All but torch, which stays as it is pinned; `-- torch` takes the lowest of it too, for which
    the package index has CUDA builds only.
    """
    torch, arguments = torch_pin(session.posargs)
    lowest = [*floors(), *floors("hf")]
    if torch:
        lowest = [line for line in lowest if not line.startswith("torch==")]
    session.install(*torch, *lowest, *editable(*FOLDERS[:-1]), *group("test"))
    chosen = ("-m", "not slow and not versionless")
    session.run("pytest", *WORKERS, *chosen, *UNPINNED, *tests_of(FOLDERS[:-1]), *arguments)
    # a model split over processes looks different in old releases, which need accelerate for it
    session.install("accelerate", *lowest)
    session.run("pytest", "-m", "slow", "tests/contract/test_tensor_parallel.py")


def torch_pin(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return torch's pin, or nothing where "torch" is asked for, and the arguments for pytest."""
    torch = [] if "torch" in arguments else [pinned("general", "torch")]
    return torch, [argument for argument in arguments if argument != "torch"]


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


@nox.session(default=False, tags=["isolation"])
def wheels(session: nox.Session) -> None:
    """Build the sdist of every distribution and from it the wheel, into dist/."""
    session.install("build[uv]", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for folder in FOLDERS:
        build = ("python", "-m", "build", "--installer", "uv", "--outdir", "dist")
        session.run(*build, str(folder), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(ROOT.glob("dist/*"))))


@nox.session(default=False, tags=["isolation"], requires=["wheels"])
def artifacts(session: nox.Session) -> None:
    """Check what the wheels and sdists hold, and what every wheel brings with it."""
    session.install("-e", "core", "uv", *group("test"))
    session.run("pytest", "-m", "built", "tests/packaging/test_artifacts.py", *session.posargs)


@nox.session(default=False, tags=["isolation"], requires=["wheels"])
@nox.parametrize("method", sorted(PLUGINS))
def isolated(session: nox.Session, method: str) -> None:
    """Test one method from its wheel, with nothing of ours beside it but the core."""
    # by path: an installer may take an older build of the same version from its cache
    built = [*ROOT.glob("dist/kvdock-*.whl"), *ROOT.glob(f"dist/kvdock_{method}-*.whl")]
    session.install(*pins(PLUGINS[method]), *map(str, built), *group("test"))
    # nothing of the checkout may be found by accident
    session.chdir(session.create_tmp())
    listing = (
        "from importlib.metadata import distributions;"
        "found = sorted(d.name for d in distributions() if d.name.startswith('kvdock'));"
        f"assert found == ['kvdock', 'kvdock-{method}'], found"
    )
    session.run("python", "-c", listing)
    session.run("kvdock", "doctor", method)
    config = ("-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT))
    proofs = [f"{ROOT}/tests/isolation/test_{name}.py" for name in ("neighbours", "residue")]
    session.run("pytest", *config, "-m", "", *proofs)
    session.run("pytest", *WORKERS, *config, f"{ROOT}/plugins/{method}/tests", *session.posargs)


@nox.session(name="pip-only", venv_backend="none", default=False, tags=["isolation"])
def pip_only(session: nox.Session) -> None:
    """Install every method with pip alone from a clean clone and run the README's example."""
    session.run(sys.executable, "tests/isolation/pip_only.py", *session.posargs, external=True)
