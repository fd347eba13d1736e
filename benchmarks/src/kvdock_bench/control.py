"""Random eviction: the control that every method has to beat at the same budget."""

from dataclasses import dataclass

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper
from kvdock.options import Options, option

SPEC_VERSION = 1


@dataclass(frozen=True, slots=True)
class RandomOptions(Options):
    """By default nothing is protected, not even the end of the prompt."""

    window: int = option(0, ge=0, help="last entries that are always kept")
    seed: int = option(0, ge=0, help="seed of the draw; the same in every batch")


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return the record of the control."""
    return [
        Method(
            id="random",
            name="Random",
            kind="eviction",
            summary="keeps random entries; the control of the benchmarks, not a method to use",
            factory="kvdock_bench.control_policy:RandomPolicy",
            options="kvdock_bench.control:RandomOptions",
            paper=Paper(title="Random eviction (control)", venue="-", url="-"),
            capabilities=Capabilities(),
        )
    ]
