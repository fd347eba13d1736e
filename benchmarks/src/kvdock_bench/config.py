"""Read a config, packaged or from a file, and say exactly what is wrong with it."""

from __future__ import annotations

import reprlib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.schema import BenchConfig, DataSources, Generation, parse_length

__all__ = [
    "BenchConfig",
    "load_config",
    "make_config",
    "override",
    "packaged_configs",
    "parse_length",
]

_LARGEST = 1 << 20
_SECTIONS: dict[str, Any] = {"": BenchConfig, "generation": Generation, "data": DataSources}


class _Loader(yaml.SafeLoader):
    """Safe YAML (no python tags) that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def packaged_configs() -> list[str]:
    """Return the names of the configs that come with the package."""
    folder = resources.files("kvdock_bench") / "configs"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str | Path) -> BenchConfig:
    """Load a packaged config by name (any case), or a YAML file by path."""
    text, origin = _read(str(name_or_path))
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as err:
        raise BenchError(f"{origin}: not plain YAML: {err}") from err
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BenchError(f"{origin}: expected `key: value` lines, found {_short(content)}.")
    return make_config(content, origin)


def make_config(content: dict[str, Any], origin: str) -> BenchConfig:
    """Check a mapping against the schema; errors name origin, key, value and what is allowed."""
    try:
        return BenchConfig.model_validate(content)
    except ValidationError as err:
        lines = list(dict.fromkeys(_explain(error) for error in err.errors(include_url=False)))
        raise BenchError("\n".join(f"{origin}: {line}" for line in lines)) from err
    except BenchError as err:
        raise BenchError(f"{origin}: {err}") from err


def override(config: BenchConfig, **changes: Any) -> BenchConfig:
    """Return the config with some keys changed and everything checked again."""
    content = {**config.model_dump(mode="python"), **changes}
    return make_config(content, "command line")


def _read(name: str) -> tuple[str, str]:
    packaged = {known.lower(): known for known in packaged_configs()}
    path = Path(name).expanduser()
    if name.lower() in packaged and not path.is_file():
        entry = resources.files("kvdock_bench") / "configs" / f"{packaged[name.lower()]}.yaml"
        return entry.read_text("utf-8"), entry.name
    try:
        if path.stat().st_size > _LARGEST:
            raise BenchError(f"{path}: larger than 1 MiB; that is no config file.")
        return path.read_text("utf-8"), str(path)
    except (OSError, UnicodeDecodeError, ValueError) as err:
        hint = did_you_mean(path.stem, packaged.values())
        raise BenchError(
            f"No config {name!r}: neither a packaged one nor a readable file ({err}).{hint}"
        ) from err


def _explain(error: Any) -> str:
    """Say in one line which key is wrong and what it should be."""
    path = [str(part) for part in error["loc"]]
    value = _short(error["input"])
    if error["type"] == "extra_forbidden":
        section = _SECTIONS.get(path[0] if len(path) > 1 else "", BenchConfig)
        hint = did_you_mean(path[-1], section.model_fields)
        return f"unknown key {'.'.join(path)!r} (value {value}).{hint}"
    # Below a field, pydantic adds the names of tried types; users know keys only.
    depth = 2 if path[:1] in (["generation"], ["data"], ["task_args"]) else 1
    where = ".".join(path[:depth])
    reason = error["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}; found {value}." if where else reason


def _short(value: object) -> str:
    # A few lines of YAML can stand for a value of any size.
    brief = reprlib.Repr()
    brief.maxlevel = 2
    return brief.repr(value)
