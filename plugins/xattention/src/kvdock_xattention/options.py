"""XAttention's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class XAttentionOptions(Options):
    """One threshold for all heads, or one per query head in the order of the model's heads."""

    stride: int = option(
        8,
        choices=(4, 8, 16),
        symbol="S",
        help="tokens per tile; larger is faster, coarser",
    )
    threshold: tuple[float, ...] | float = option(
        0.9,
        ge=0,
        le=1,
        multiple=True,
        symbol="τ",
        help="share of the estimated attention to keep; 1 attends densely",
    )
    mode: str = option(
        "compat",
        choices=("compat", "exact"),
        help="compat keeps what the authors' code keeps, one block more in its first score chunk",
    )
    block: int = option(
        128, choices=(16, 32, 64, 128), help="tokens per block; some kernels serve 128 only"
    )
    share_group: bool = option(False, help="one list for the query heads of a key/value head")
    dense_below: int = option(16_384, ge=0, help="keys below which attention is dense")

    def validate(self) -> None:
        """Refuse an empty table of thresholds, and one beside a shared list."""
        if not self.thresholds:
            raise OptionError("threshold is (); expected a number, or one per query head.")
        if self.block < self.stride:
            raise OptionError(f"block is {self.block}; expected at least stride={self.stride}.")
        if self.share_group and len(self.thresholds) > 1:
            raise OptionError(
                f"threshold has {len(self.thresholds)} values and share_group is True; heads that"
                " share a list need one threshold."
            )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Return the thresholds, one or as many as there are query heads."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    @property
    def dense(self) -> bool:
        """Say whether every head attends densely."""
        return min(self.thresholds) >= 1
