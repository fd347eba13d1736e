"""The record by which a plugin describes a method: data, so reading it imports nothing heavy."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvdock.errors import MethodLoadError, OptionError
from kvdock.options import Options, build

KINDS = ("eviction", "layer-budget", "merge", "quantisation", "channel-pruning", "sparse-prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a method does and supports; `attach` refuses early what does not compose."""

    phases: frozenset[str] = frozenset({"prefill"})
    per_layer_lengths: bool = False
    per_head_lengths: bool = False
    needs_queries: bool = False
    needs_probabilities: bool = False
    evicts: bool = True
    supports_padding: bool = True
    supports_beam: bool = True
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    shortest_gain: int | None = None
    exact_chunks: bool = True


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published."""

    title: str
    venue: str
    url: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method needs beyond `kvdock[hf]`: extras of its own package, a GPU."""

    extras: tuple[str, ...] = ()
    gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Describe one method.

    Args:
        id: lower-case name without separators, equal to the name of the entry point.
        name: the paper's spelling.
        factory: "module:attribute" of a callable that takes the options and returns a policy.
        options: "module:attribute" of the `Options` class.
        default_budget: slots per layer and KV head when the user gives no budget; None if the
            method takes none.
        lossless: options under which the output is the plain model's, for a method that no budget
            makes so.
        contract: options under which the contract suite's tiny models (head_dim 16, or 32 where
            entries are stored in a form of their own; prompts of 33 to 97 tokens, 24 new ones)
            exercise the method.
    """

    id: str
    name: str
    kind: str
    factory: str
    options: str
    paper: Paper
    capabilities: Capabilities = field(default_factory=Capabilities)
    needs: Needs = Needs()
    default_budget: int | None = 2048
    summary: str = ""
    lossless: Mapping[str, Any] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id or self.id != canonical(self.id):
            raise ValueError(
                f"method id {self.id!r} must be lower-case, without separators: "
                f"{canonical(self.id)!r}."
            )
        if self.kind not in KINDS:
            raise ValueError(
                f"method {self.id!r} has kind {self.kind!r}, expected one of {', '.join(KINDS)}."
            )
        for name in ("factory", "options"):
            reference = getattr(self, name)
            module, _, attribute = reference.partition(":")
            if not module or not attribute:
                raise ValueError(
                    f"method {self.id!r}: {name} is {reference!r}, expected 'module:attribute'."
                )

    def options_type(self) -> type[Options]:
        """Import and return the class of the method's options."""
        cls = _load(self.id, self.options)
        if not (isinstance(cls, type) and issubclass(cls, Options)):
            raise MethodLoadError(
                f"method {self.id!r}: {self.options!r} is not a subclass of kvdock.options.Options."
            )
        return cls

    def make_options(self, **options: Any) -> Options:
        """Check the values and return the method's options; an error names the method."""
        try:
            return build(self.options_type(), options)
        except OptionError as error:
            raise OptionError(f"{self.id}: {error}") from None

    def create(self, options: Options) -> Any:
        """Call the factory with ready options and return the policy."""
        return _load(self.id, self.factory)(options)

    def build(self, **options: Any) -> Any:
        """Check the options and return the policy."""
        return self.create(self.make_options(**options))


def canonical(name: str) -> str:
    """Return the id of a method for any of its spellings: `Snap-KV` → `snapkv`."""
    return re.sub(r"[-_\s]", "", name).lower()


def _load(method: str, reference: str) -> Any:
    module, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MethodLoadError(
            f"method {method!r}: cannot load {reference!r} ({reason})."
        ) from error
    return found
