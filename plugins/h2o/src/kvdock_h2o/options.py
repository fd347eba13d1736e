"""H2O's options; importable without torch."""

from dataclasses import dataclass

from kvdock.options import Options, option


@dataclass(frozen=True, slots=True)
class H2OOptions(Options):
    """Without ``heavy`` and ``recent`` each gets half of the budget, as in the paper."""

    heavy: int | None = option(
        None, ge=1, symbol="H", help="heavy hitters; what recent leaves of the budget when unset"
    )
    recent: int | None = option(
        None, ge=1, symbol="R", help="last tokens, never evicted; what heavy leaves when unset"
    )
    reduce: str = option(
        "mean",
        choices=("mean", "sum"),
        help="how the scores of a group's query heads become one; ranks alike",
    )
