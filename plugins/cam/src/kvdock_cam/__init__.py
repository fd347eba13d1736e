"""CaM: merge the values of evicted tokens into the tokens kept after them."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper

SPEC_VERSION = 1


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return CaM's record."""
    return [
        Method(
            id="cam",
            name="CaM",
            kind="merge",
            summary="merges the values of evicted tokens into the tokens kept after them",
            factory="kvdock_cam.policy:CaMPolicy",
            options="kvdock_cam.options:CaMOptions",
            paper=Paper(
                title="CaM: Cache Merging for Memory-efficient LLMs Inference",
                venue="ICML 2024",
                url="https://openreview.net/forum?id=LCTmppB165",
            ),
            capabilities=Capabilities(needs_queries=True, shortest_gain=2048),
            default_budget=2048,
        )
    ]
