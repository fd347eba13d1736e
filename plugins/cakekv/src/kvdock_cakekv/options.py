"""CakeKV's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class CakeKVOptions(Options):
    """Defaults are those of the authors' command line."""

    window: int = option(32, ge=1, symbol="w", help="last prompt queries that vote; always kept")
    kernel: int = option(5, ge=1, symbol="k", help="width of the average over neighbours, odd")
    gamma: float = option(
        200.0, ge=0, symbol="γ", help="weight of an entry's variance beside its mean attention"
    )
    tau1: float | None = option(
        None, ge=0.1, symbol="τ1", help="temperature of the dispersion; None looks the model up"
    )
    tau2: float | None = option(
        None, ge=0.1, symbol="τ2", help="temperature of the shift; None looks the model up"
    )
    decode_pool: bool = option(True, help="average over neighbours while decoding too")

    def validate(self) -> None:
        """Refuse an even kernel."""
        if self.kernel % 2 == 0:
            raise OptionError(
                f"option 'kernel' is {self.kernel}, expected an odd width, so that pooling stays"
                " centred."
            )
