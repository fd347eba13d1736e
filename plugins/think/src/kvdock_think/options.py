"""ThinK's options; importable without torch."""

from dataclasses import dataclass

from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class ThinKOptions(Options):
    """Window and recent tokens are the authors'; the ratio keeps 80 channels of 128, not 77."""

    ratio: float = option(0.375, ge=0, lt=1, symbol="λ", help="share of key channels dropped")
    window: int = option(32, ge=1, symbol="w", help="last prompt queries that rate the channels")
    recent: int = option(32, ge=0, symbol="r", help="last tokens that keep all their channels")
    block: int = option(128, ge=1, help="decoded tokens that lose theirs at a time")
