"""Read a config, packaged or from a file, and say exactly what is wrong with it."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.schema import BenchConfig, DataSources, Generation, JsonlFile, parse_length

__all__ = [
    "BenchConfig",
    "load_config",
    "make_config",
    "override",
    "packaged_configs",
    "parse_length",
]

_LARGEST = 1 << 20
_LARGEST_NUMBER = 2**63 - 1
# what PyYAML lets through for `2001-13-45`, `!!bool x`, `!!timestamp x` and numbers without end
_BAD_VALUES = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
_SECTIONS: dict[str, Any] = {
    "": BenchConfig,
    "generation": Generation,
    "data": DataSources,
    "jsonl": JsonlFile,
}


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


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = int(loader.construct_yaml_int(node))
    if abs(number) > _LARGEST_NUMBER:
        # one of more than 4300 digits could not even be told
        raise _wrong(node, f"the number {node.value:.20}… is too large")
    return number


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_yaml_str(node))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(node, f"half a character ({error})") from error
    return text


def _bytes(_: _Loader, node: yaml.ScalarNode) -> bytes:
    raise _wrong(node, "bytes have no place in a config")


def _wrong(node: yaml.ScalarNode, reason: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


for _kind, _construct in (("int", _whole_number), ("str", _text), ("binary", _bytes)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def packaged_configs() -> list[str]:
    """Return the names of the configs that come with the package."""
    folder = resources.files("kvdock_bench") / "configs"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str | Path) -> BenchConfig:
    """Load a packaged config by name (any case), or a YAML file by path.

    A file may begin from another one: `extends: NAME_OR_PATH`, the path relative to the file.
    """
    source = _find(str(name_or_path))
    return make_config(_merged(source, []), source.origin)


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
    content = {**config.model_dump(mode="json"), **changes}
    return make_config(content, "command line")


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a config's text is; `folder` is None for a packaged one."""

    origin: str
    text: str
    folder: Path | None


def _merged(source: _Source, chain: list[str]) -> dict[str, Any]:
    """Return a config's keys over those of the config it extends."""
    chain = [*chain, source.origin]
    if source.origin in chain[:-1]:
        raise BenchError(
            f"{chain[0]}: the configs extend each other in a circle: {' -> '.join(chain)}. "
            "Take `extends` out of one of them."
        )
    content = _parse(source)
    base = content.pop("extends", None)
    files = content.get("jsonl")
    if source.folder is not None and isinstance(files, dict):
        for entry in files.values():
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                entry["path"] = str(source.folder / Path(entry["path"]).expanduser())
    if base is None:
        return content
    if not isinstance(base, str):
        raise BenchError(f"{source.origin}: extends: expected a config, found {_short(base)}.")
    merged = _merged(_find(base, source.folder), chain)
    if "lengths" in content or "length" in content:
        merged = {key: merged[key] for key in merged if key not in ("length", "lengths")}
    for key, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _parse(source: _Source) -> dict[str, Any]:
    try:
        content = yaml.load(source.text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, *_BAD_VALUES) as err:
        raise BenchError(f"{source.origin}: not plain YAML: {err}") from err
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BenchError(f"{source.origin}: expected `key: value` lines, found {_short(content)}.")
    return content


def _find(name: str, folder: Path | None = None) -> _Source:
    packaged = {known.lower(): known for known in packaged_configs()}
    path = Path(name)
    try:
        path = (folder or Path()) / path.expanduser()
        if name.lower() in packaged and not path.is_file():
            entry = resources.files("kvdock_bench") / "configs" / f"{packaged[name.lower()]}.yaml"
            return _Source(entry.name, entry.read_text("utf-8"), None)
        if path.stat().st_size > _LARGEST:
            raise BenchError(f"{path}: larger than 1 MiB; that is no config file.")
        origin = Path(os.path.normpath(path))
        return _Source(str(origin), path.read_text("utf-8"), origin.parent)
    except (OSError, RuntimeError, ValueError) as err:
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
    depth = {"generation": 2, "data": 2, "task_args": 2, "jsonl": 3}
    where = ".".join(path[: depth.get(path[0], 1)]) if path else ""
    reason = error["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}; found {value}." if where else reason


def _short(value: object) -> str:
    # A few lines of YAML can stand for a value of any size.
    brief = reprlib.Repr()
    brief.maxlevel = 2
    return brief.repr(value)
