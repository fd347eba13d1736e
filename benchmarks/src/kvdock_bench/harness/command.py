"""Run lm-eval's own command line with the model `kvdock` in its registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvdock_bench.errors import BenchError

NAME = "kvdock"
MODEL = "kvdock_bench.harness.model:KVDockLM"


def register() -> None:
    """Put the model into lm-eval's registry, unless lm-eval found the entry point itself."""
    try:
        # fills the registry, which is not filled any more once it holds something
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise BenchError(
            f"lm-eval cannot be imported ({error}). Install it: pip install 'kvdock-bench[lm-eval]'"
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)


def main(arguments: Sequence[str]) -> None:
    """Pass the arguments to lm-eval."""
    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
