"""ThinK: store only the key channels that the last queries of the prompt make use of."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Paper


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return ThinK's record."""
    return [
        Method(
            id="think",
            name="ThinK",
            kind="channel-pruning",
            summary="stores only the key channels that the prompt's last queries use",
            factory="kvdock_think.policy:ThinKPolicy",
            options="kvdock_think.options:ThinKOptions",
            paper=Paper(
                title="ThinK: Thinner Key Cache by Query-Driven Pruning",
                venue="ICLR 2025",
                url="https://arxiv.org/abs/2407.21018",
            ),
            capabilities=Capabilities(needs_queries=True, evicts=False, shortest_gain=512),
            default_budget=None,
            lossless={"ratio": 0.0},
            contract={"window": 8, "recent": 8, "block": 16},
        )
    ]
