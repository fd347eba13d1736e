"""KIVI: keep keys in few bits per channel and values in few bits per token."""

from kvdock.hookspecs import hookimpl
from kvdock.method import Capabilities, Method, Needs, Paper

SPEC_VERSION = 1


@hookimpl
def kvdock_methods() -> list[Method]:
    """Return KIVI's record."""
    return [
        Method(
            id="kivi",
            name="KIVI",
            kind="quantisation",
            summary="keeps keys and values in 2 or 4 bits, the newest tokens as they are",
            factory="kvdock_kivi.policy:KiviPolicy",
            options="kvdock_kivi.options:KiviOptions",
            paper=Paper(
                title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
                venue="ICML 2024",
                url="https://arxiv.org/abs/2402.02750",
            ),
            capabilities=Capabilities(
                phases=frozenset({"prefill", "decode"}), evicts=False, shortest_gain=512
            ),
            needs=Needs(extras=("triton",)),
            default_budget=None,
            contract={"group_size": 32, "residual_length": 32},
            lossless={"bits": 16},
        )
    ]
