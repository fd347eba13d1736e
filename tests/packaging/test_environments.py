"""What the pinned environments must fulfil."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in ROOT.glob("envs/*/requirements.in"))
every_environment = pytest.mark.parametrize("name", NAMES)


def lines(name, file):
    text = (ROOT / "envs" / name / file).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name):
    return dict(line.split("==") for line in lines(name, "constraints.txt"))


def test_the_environments_are_the_three_of_the_design():
    found = {name: (pins(name)["torch"], pins(name)["transformers"]) for name in NAMES}
    assert found == {
        "general": ("2.13.0", "5.23.0"),
        "flexprefill": ("2.13.0", "5.17.0"),
        "xattention": ("2.13.0", "5.4.0"),
    }


@every_environment
def test_constraints_are_plain_pins(name):
    for line in lines(name, "constraints.txt"):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


@every_environment
def test_constraints_follow_what_is_asked_for(name):
    asked = [line for file in ("requirements.in", "gpu.in") for line in lines(name, file)]
    exact = dict(line.split("==") for line in asked if "==" in line)
    assert {"torch", "transformers", "triton"} <= set(exact)
    assert {key: pins(name)[key] for key in exact} == exact


@every_environment
def test_test_tools_are_pinned_and_no_vision_package_is_let_in(name):
    # torchvision built for CUDA breaks importing transformers beside torch's CPU build
    assert {"pytest", "hypothesis", "pluggy", "typer"} <= set(pins(name))
    assert not {"torchvision", "torchaudio"} & set(pins(name))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_vllm_is_pinned_apart_from_the_rest(kind):
    pinned = dict(line.split("==") for line in lines("vllm", f"{kind}-constraints.txt"))
    asked = dict(line.split("==") for line in lines("vllm", f"{kind}.in") if "==" in line)
    assert asked
    assert {key: pinned[key] for key in asked} == asked
    assert pinned["torch"] == pins("general")["torch"]
    assert ("torchvision" in pinned) is (kind == "gpu")


def test_this_process_runs_in_one_of_the_environments_or_none():
    """Where a pinned transformers is installed, everything else that is pinned agrees with it."""
    try:
        here = version("transformers")
    except PackageNotFoundError:
        pytest.skip("transformers is not installed")
    home = [name for name in NAMES if pins(name)["transformers"] == here]
    if not home:
        pytest.skip(f"transformers {here} belongs to no environment")
    for name in ("torch", "numpy", "tokenizers", "huggingface-hub"):
        assert version(name).split("+")[0] == pins(home[0])[name]


def test_the_supported_range_of_transformers_begins_at_the_oldest_environment():
    core = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]
    (range_,) = [line for line in core["optional-dependencies"]["hf"] if "transformers" in line]
    lowest = re.search(r">=([\d.]+)", range_)[1]
    oldest = min([int(n) for n in pins(name)["transformers"].split(".")] for name in NAMES)
    assert oldest == [int(n) for n in lowest.split(".")] + [0]
