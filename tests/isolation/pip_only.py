"""Install methods with pip alone, from a clean clone, and run the README's Python example.

`python tests/isolation/pip_only.py [METHOD…]`: all methods unless some are named. It needs git,
Python and pip; it makes its environments in a temporary folder. The first method is installed into
a bare environment, the others into copies of it from which everything of ours was taken out again.

KVDOCK_TORCH is the requirement that is installed first, by default the pinned torch; an empty one
leaves the choice to pip. KVDOCK_MODEL is a model's folder; by default SmolLM2 is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import importlib.metadata as metadata
found = sorted(d.name for d in metadata.distributions() if d.name.startswith("kvdock"))
assert found == {wanted}, found
"""
RECORD = "import sys, kvdock; print(kvdock.default_host().load(sys.argv[1]).default_budget)"
README = (ROOT / "README.md").read_text("utf-8")
PATH = re.compile(r"^path = .*$", re.MULTILINE)
LOCATE = "from kvdock_bench.models import locate; print(locate('smollm2-135m'))"


class Environment:
    """A virtual environment with nothing but pip, or a copy of another one.

    Args:
        copied: whose files are linked, not copied; pip replaces files, so none is shared for long.
    """

    def __init__(self, folder: Path, copied: Environment | None = None) -> None:
        self.folder = folder
        if copied is None:
            venv.create(folder, with_pip=True, symlinks=True)
        else:
            shutil.copytree(copied.folder, folder, symlinks=True, copy_function=os.link)

    def python(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run the environment's Python, with none of the caller's packages; return its output."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.folder / "bin" / "python"), *arguments],
            cwd=cwd or self.folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(arguments)[:300]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def pip(self, *arguments: str, cwd: Path | None = None) -> None:
        """Run the environment's pip, which is the one that came with Python."""
        self.python("-m", "pip", "--disable-pip-version-check", *arguments, "--quiet", cwd=cwd)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long a step took."""
    start = time.monotonic()
    yield
    print(f"{what:<58} {time.monotonic() - start:6.1f} s", flush=True)


def pinned_torch() -> str:
    """Return the torch that the environments pin."""
    text = (ROOT / "envs" / "general" / "requirements.in").read_text()
    return re.findall(r"^torch==.*$", text, re.MULTILINE)[0]


def example(id: str, budget: bool) -> str:
    """Return the README's example for another method, without a budget where it takes none."""
    code = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[0]
    call = re.search(r"kvdock\.attach\(model, (\"snapkv\"(, budget=\d+)?)\)", code)
    assert call and call[2], f"the README's example attaches snapkv with a budget; found:\n{code}"
    return code.replace(call[1], f'"{id}"{call[2] if budget else ""}')


def install(environment: Environment, clone: Path, id: str) -> None:
    """Install one method as the README says and check that nothing else of ours came along."""
    with timed(f"{id}: pip install ./core ./plugins/{id}"):
        environment.pip("install", "./core", f"./plugins/{id}", cwd=clone)
    environment.python("-c", ALONE.format(wanted=["kvdock", f"kvdock-{id}"]))


def prove(environment: Environment, id: str, model: str) -> None:
    """Run the README's example with a method on a real model."""
    budget = environment.python("-c", RECORD, id).strip() != "None"
    script = environment.folder / "example.py"
    script.write_text(example(id, budget).replace(PATH.search(README)[0], f"path = {model!r}"))
    with timed(f"{id}: the README's example"):
        told = environment.python(str(script))
    assert f"{id}: holds" in told, told
    print("  " + next(line for line in told.splitlines() if "holds" in line), flush=True)


def locate(base: Environment, clone: Path, folder: Path) -> str:
    """Return the folder of the model, fetched and converted by the benchmarks."""
    if own := os.environ.get("KVDOCK_MODEL"):
        return own
    environment = Environment(folder, copied=base)
    with timed("SmolLM2: pip install ./core ./benchmarks, fetch and convert"):
        environment.pip("install", "./core", "./benchmarks", cwd=clone)
        return environment.python("-c", LOCATE).splitlines()[-1]


def main(methods: list[str]) -> None:
    """Install and prove every method."""
    with tempfile.TemporaryDirectory(prefix="kvdock-pip-only-") as name:
        work = Path(name)
        clone = work / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        first, bare = methods[0], Environment(work / methods[0])
        if torch := os.environ.get("KVDOCK_TORCH", pinned_torch()):
            with timed(f"pip install {torch}"):
                bare.pip("install", torch)
        install(bare, clone, first)
        base = Environment(work / "base", copied=bare)
        base.pip("uninstall", "--yes", "kvdock", f"kvdock-{first}")
        model = locate(base, clone, work / "model")
        prove(bare, first, model)
        for id in methods[1:]:
            environment = Environment(work / id, copied=base)
            install(environment, clone, id)
            prove(environment, id, model)
            shutil.rmtree(environment.folder)
        print(f"{len(methods)} methods installed and used, each on its own")


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")))
