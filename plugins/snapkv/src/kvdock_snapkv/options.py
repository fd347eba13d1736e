"""SnapKV's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class SnapKVOptions(Options):
    """Defaults are those of the authors' LongBench runs."""

    window: int = option(32, ge=1, symbol="w", help="last prompt queries that vote; always kept")
    kernel: int = option(7, ge=1, symbol="k", help="pooling width along the sequence, odd")
    pooling: str = option("max", choices=("max", "avg"), help="how neighbouring votes are pooled")
    recompress: bool = option(False, help="compress again at the end of every later turn")

    def __post_init__(self) -> None:
        """Check every value."""
        Options.__post_init__(self)
        if self.kernel % 2 == 0:
            raise OptionError(
                f"kernel is {self.kernel}; expected an odd width, so that pooling stays centred."
            )
