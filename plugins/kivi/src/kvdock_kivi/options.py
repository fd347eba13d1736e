"""KIVI's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class KiviOptions(Options):
    """Four bits suit models with grouped queries, two bits save most."""

    bits: int = option(
        4, choices=(2, 4, 16), symbol="b", help="bits per key and value; 16 packs nothing"
    )
    group_size: int = option(
        32, choices=(32, 64, 128), symbol="g", help="numbers under one scale and zero"
    )
    residual_length: int = option(
        128, ge=32, symbol="R", help="newest tokens kept as they are; a multiple of group_size"
    )

    def validate(self) -> None:
        """Check that whole groups fill the residual."""
        if self.residual_length % self.group_size:
            raise OptionError(
                f"residual_length is {self.residual_length}; expected a multiple of group_size,"
                f" {self.group_size}: keys leave it in whole groups."
            )
