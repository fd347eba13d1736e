"""PyramidKV's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class PyramidKVOptions(Options):
    """Defaults are those of the authors' LongBench runs."""

    window: int = option(8, ge=1, symbol="α", help="last prompt queries that vote; always kept")
    kernel: int = option(7, ge=1, symbol="k", help="pooling width along the sequence, odd")
    pooling: str = option("max", choices=("max", "avg"), help="how neighbouring votes are pooled")
    beta: float = option(
        20.0, ge=1, symbol="β", help="steepness: the last layer gets 1/β of the mean; 1 is level"
    )
    rounding: str = option(
        "exact",
        choices=("exact", "official"),
        help="keep the total exactly, or round as the authors' code, which exceeds it",
    )
    recompress: bool = option(False, help="compress again at the end of every later turn")

    def validate(self) -> None:
        """Refuse an even kernel."""
        if self.kernel % 2 == 0:
            raise OptionError(
                f"option 'kernel' is {self.kernel}, expected an odd width, so that pooling stays"
                " centred."
            )
