"""Tables as texts, once for Markdown, HTML and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from kvdock_bench.escaping import markdown
from kvdock_bench.record import OOM, UNFIT
from kvdock_bench.scores import FAILED, PARTIAL, Score
from kvdock_bench.statistics import Paired
from kvdock_bench.tasks import OWN_LENGTH

NOISE = "≈"
_MOST_COLUMNS = 9


@dataclass(frozen=True, slots=True)
class Table:
    """A titled grid of texts; the first column names the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Tell whether no row has anything beside its name."""
        return not any(any(row[1:]) for row in self.rows)

    def fitted(self) -> Table:
        """Return the table turned around where it has too many columns to be read side by side."""
        if len(self.head) <= max(_MOST_COLUMNS, len(self.rows)):
            return self
        names = [row[0] for row in self.rows]
        # the corner names the rows, which are what the columns were
        turned = [list(line) for line in zip(self.head, *self.rows, strict=True)][1:]
        return Table(self.title, ["Method", *names], turned, self.note)

    def to_markdown(self) -> str:
        """Return a heading, a pipe table and the note."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        grid = "\n".join("| " + " | ".join(map(markdown, line)) + " |" for line in lines)
        note = f"\n{markdown(self.note)}\n" if self.note else ""
        return f"## {markdown(self.title)}\n\n{grid}\n{note}"


def clock(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size(count: float | None) -> str:
    """Return bytes with a binary unit."""
    if count is None:
        return ""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"


def length_name(length: int) -> str:
    """Return 4K for 4096, 500 for 500, and "own" for prompts that are not fitted."""
    if length == OWN_LENGTH:
        return "own"
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def score_text(score: Score, paired: Paired | None = None) -> str:
    """Return a number with its standard error, or the sign of why there is none.

    Args:
        paired: the difference to the full cache; where it may be chance, the number is marked.
    """
    if score.value is None:
        return {OOM: "-", UNFIT: "n/a", FAILED: "error"}.get(score.status, "")
    error = "" if score.error is None else f" ±{score.error:.1f}"
    noise = f" {NOISE}" if paired is not None and paired.within_noise else ""
    part = f" (n={score.n})" if score.status == PARTIAL else ""
    if score.lacking:
        part = f" (n={score.n}, {score.lacking} {_plural('task', score.lacking)} missing)"
    return f"{score.value:.2f}{error}{noise}{part}"


def paired_text(pair: Paired | None) -> str:
    """Return a difference with its interval, marked where it may be chance."""
    if pair is None:
        return ""
    noise = f" {NOISE}" if pair.within_noise else ""
    return f"{pair.difference:+.2f} [{pair.low:+.1f}, {pair.high:+.1f}]{noise}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
