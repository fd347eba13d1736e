"""Load, attach, use and detach methods in a fresh process; print what they left behind.

`python residue.py METHOD…` prints one JSON object: method → list of what changed.
"""

import gc
import json
import logging
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable

import torch
import transformers

from kvdock.testing import Case, residue
from kvdock.testing_models import left_padded

WATCHED = ("torch", "transformers", "pluggy", "numpy", "builtins")
PLAIN = (bool, int, float, str, bytes)


def watched(name: str) -> bool:
    """Say whether a module belongs to a library that nothing may be changed in."""
    return name.split(".")[0] in WATCHED


def namespaces() -> dict[str, object]:
    """Return every module and every class of the watched libraries, by name."""
    found: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if watched(name) and isinstance(module, types.ModuleType):
            found[name] = module
            for attribute, value in list(vars(module).items()):
                if issubclass(type(value), type) and value.__module__ == name:
                    found[f"{name}.{attribute}"] = value
    return found


def contents(owner: object) -> dict[str, object]:
    """Return what a namespace holds, but for what its library notes on use, whoever the user is."""
    return {
        key: frozen(value)
        for key, value in list(vars(owner).items())
        if not key.startswith("_abc") and not key.endswith("_cached_value")
    }


def frozen(value: object) -> object:
    """Return a value that compares unequal once the attribute was rebound or refilled."""
    # by type(), because deprecated objects of torch warn when they are asked for their class
    if type(value) in PLAIN:
        return repr(value)
    if type(value) in (dict, list, set):
        return id(value), len(value)
    return id(value)


def switches() -> dict[str, object]:
    """Return the settings of the process that a library could turn."""
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": len(warnings.filters),
        "signals": {name: repr(signal.getsignal(name)) for name in signal.valid_signals()},
        "excepthook": id(sys.excepthook),
        "log level": logging.root.level,
        "log handlers": len(logging.root.handlers),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch threads": torch.get_num_threads(),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "verbosity": transformers.logging.get_verbosity(),
    }


def snapshot() -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """Return the contents of all watched namespaces and the switches."""
    gc.collect()
    return {name: contents(owner) for name, owner in namespaces().items()}, switches()


def differences(before: tuple, after: tuple) -> list[str]:
    """List what changed between two snapshots; a module that was merely imported is no change."""
    found = []
    for name, old in before[0].items():
        new = after[0].get(name, {})
        for key in old.keys() | new.keys():
            if old.get(key) == new.get(key) or (key not in old and f"{name}.{key}" in sys.modules):
                continue
            found.append(f"{name}.{key}")
    found += [key for key in before[1] if before[1][key] != after[1][key]]
    return sorted(found)


def use(id: str) -> None:
    """Attach a method to a tiny model, generate, and detach."""
    case = Case(id)
    model, (batch, _) = case.model(), left_padded((97, 70, 33))
    before, logits = residue(model), model(**batch).logits
    with case.attach(model):
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert residue(model) == before, f"{id} left something on the model"
    assert torch.equal(model(**batch).logits, logits), f"{id} changed the plain model's logits"


def warm_up() -> None:
    """Make torch and transformers fill the caches that any use of a model fills."""
    from kvdock.testing_models import tiny_model

    model, (batch, _) = tiny_model("llama"), left_padded((97, 70, 33))
    for _ in range(2):
        model.generate(**batch, max_new_tokens=4, do_sample=False)


def left_behind(action: Callable[[], None]) -> list[str]:
    """Return what an action changed."""
    before = snapshot()
    action()
    return differences(before, snapshot())


if __name__ == "__main__":
    warm_up()
    print(json.dumps({id: left_behind(lambda id=id: use(id)) for id in sys.argv[1:]}))
