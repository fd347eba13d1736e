"""lm-eval's model `kvdock`: its Hugging Face model with methods attached."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

import kvdock
from kvdock.method import canonical
from kvdock.registry import default_host
from kvdock_bench.errors import BenchError, did_you_mean
from kvdock_bench.harness.scoring import Request, make_batches, score
from kvdock_bench.models import locate, warn_of_remote_code

_log = logging.getLogger(__name__)


@register_model("kvdock")
class KVDockLM(HFLM):  # type: ignore[misc]
    """Answer lm-eval's requests with a compressed cache.

    Args:
        pretrained: a local folder, a hub id, or the embedded `smollm2-135m`.
        method: a method, or several as "flexprefill+snapkv"; None for the full cache.
        budget: as everywhere: slots, "25%" of the context, or "1GiB".
        options: the methods' options as `snapkv.window=16`, or `window=16` where there is one
            method; what is no option goes to lm-eval's own model, such as dtype or max_length.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str | None = None,
        budget: int | str | None = None,
        **options: Any,
    ) -> None:
        self._method, self._budget = method, budget
        self._options = take_options(method, options)
        if method is not None and str(options.get("batch_size", 1)).startswith("auto"):
            raise BenchError(
                "batch_size=auto tries batches without a cache, which says nothing of a method. "
                "Give a number."
            )
        if isinstance(pretrained, str):
            if options.get("trust_remote_code"):
                warn_of_remote_code(pretrained)
            # other weight formats can run code when loaded
            options["use_safetensors"] = True
            pretrained = locate(pretrained)
        super().__init__(pretrained, **options)
        with self._attached():
            pass

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate; each context is compressed at the end of its prefill."""
        with self._attached():
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, with the full cache only."""
        if self._method is not None:
            raise BenchError(
                "loglikelihood_rolling scores a text without a context before it, so that a method "
                "has nothing to compress. Choose a task with contexts, or leave method out."
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._method is None:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        with (
            self._attached() as dock,
            tqdm(total=len(asked), disable=disable_tqdm or self.rank != 0) as bar,
        ):
            for batch in make_batches(asked, int(override_bs or self.batch_size)):
                scored = score(self.model, dock, [asked[place] for place in batch])
                for place, answer in zip(batch, scored, strict=True):
                    answers[place] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                bar.update(len(batch))
        return [answers[place] for place in range(len(asked))]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """Cut a context from the left where it is too long, as lm-eval does, and say so."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise BenchError(
                f"A continuation of {len(continuation)} tokens does not fit in max_length "
                f"{self.max_length}."
            )
        if len(context) > room:
            _log.warning("Cut %d tokens from the left of a context.", len(context) - room)
        return Request(tuple(context[-room:]), tuple(continuation))

    @contextlib.contextmanager
    def _attached(self) -> Iterator[Any]:
        if self._method is None:
            yield None
            return
        with kvdock.attach(self.model, self._method, budget=self._budget, **self._options) as dock:
            yield dock


def take_options(method: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Remove the methods' options from lm-eval's arguments and return them for `attach`."""
    loaded = [default_host().load(part) for part in method.split("+")] if method else []
    ids = {found.id for found in loaded}
    own = set(inspect.signature(HFLM.__init__).parameters)
    taken = {}
    for name in list(given):
        owner, dot, option = name.partition(".")
        if dot:
            if canonical(owner) not in ids:
                hint = did_you_mean(owner, sorted(ids)) if ids else " There is no method."
                raise BenchError(f"model_args: {name!r} is an option of no method here.{hint}")
            key = option if len(loaded) == 1 else f"{canonical(owner)}.{option}"
            taken[key] = given.pop(name)
        elif len(loaded) == 1 and name not in own and name in _names(loaded[0]):
            taken[name] = given.pop(name)
    return taken


def _names(method: Any) -> set[str]:
    return {field.name for field in fields(method.make_options())}
