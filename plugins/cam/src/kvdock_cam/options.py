"""CaM's options; importable without torch."""

from dataclasses import dataclass

from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class CaMOptions(Options):
    """The paper fixes none of them for long prompts; see the README."""

    window: int = option(32, ge=1, symbol="w", help="last prompt queries that vote")
    merge: int = option(32, ge=1, symbol="m", help="kept tokens that share an evicted one's value")
    base: str = option(
        "votes",
        choices=("votes", "streaming"),
        help="what is kept: the window and the most voted, or the first and the last half",
    )
    sample: bool = option(True, help="merge with probability p (the paper) instead of by weight p")
    seed: int = option(0, ge=0, help="chooses the draws; the same seed gives the same cache")
    recompress: bool = option(False, help="compress again at the end of every later turn")
