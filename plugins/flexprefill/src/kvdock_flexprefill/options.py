"""FlexPrefill's options; importable without torch."""

from dataclasses import dataclass

from kvdock.errors import OptionError
from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class FlexPrefillOptions(Options):
    """Defaults are those of the paper's runs with Llama-3.1."""

    gamma: float = option(
        0.95, gt=0, le=1, symbol="γ", help="share of the attention mass to cover; 1 is dense"
    )
    tau: float = option(
        0.1,
        ge=0,
        le=1,
        symbol="τ",
        help="largest divergence of a query-aware head; 0 none, above 0.8326 all",
    )
    min_budget: int = option(
        1024, ge=1, help="tokens that verticals, and slashes, take at least; in whole blocks"
    )
    max_budget: int | None = option(
        None, ge=1, help="tokens that verticals, and slashes, take at most; no limit when unset"
    )
    mode: str = option(
        "exact",
        choices=("exact", "compat"),
        help="exact: masses of blocks; compat: the published code's counts",
    )
    block: int = option(128, choices=(16, 32, 64, 128), help="tokens per block")
    dense_below: int = option(
        16_384, ge=0, help="sequences of fewer tokens attend densely: selection costs more"
    )

    def validate(self) -> None:
        """Check the budgets against each other."""
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise OptionError(
                f"min_budget is {self.min_budget} and max_budget {self.max_budget}; expected"
                " min_budget <= max_budget. Raise max_budget or lower min_budget."
            )

    def bounds(self, key_blocks: int) -> tuple[int, int]:
        """Return the least and the most blocks of verticals, and of slashes."""
        most = key_blocks
        if self.max_budget is not None:
            most = min(-(-self.max_budget // self.block), key_blocks)
        return min(-(-self.min_budget // self.block), most), most

    def attends_densely(self, queries: int, keys: int) -> bool:
        """Say whether the last ``queries`` of ``keys`` tokens are too few to select for."""
        shortest = max(2 * self.block, -(-self.min_budget // self.block) * self.block)
        return (
            self.gamma >= 1
            or keys < self.dense_below
            or keys <= shortest
            or queries <= self.block < keys
        )
