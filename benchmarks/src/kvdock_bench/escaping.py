"""Write texts of strangers so that a page, a table, a spreadsheet or a drawing takes them as text.

Names of models, tasks and methods come from folders and files that others may have made, and
predictions from a model.
"""

from __future__ import annotations

import re

# control characters but for tab and line end, marks that turn the direction of what follows, and
# halves of surrogate pairs
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_MARKUP = re.compile(r"[\\|`<]|&(?=#?\w+;)|\](?=[(\[])")
_AS_TEXT = {"<": "&lt;", "&": "&amp;", "]": "]\\"}
# as any spreadsheet begins a formula, in either width
_FORMULA = re.compile(r"\s*[-=+@\uff0d\uff1d\uff0b\uff20]")


def visible(text: str) -> str:
    r"""Return the text with what cannot be seen written as `\x1b` or `\u202e`."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(text: str) -> str:
    """Return the text as one line of Markdown without links, code, HTML and table borders."""
    line = " ".join(visible(text).split())
    return _MARKUP.sub(lambda found: _AS_TEXT.get(found[0], f"\\{found[0]}"), line)


def spreadsheet(text: str) -> str:
    """Return a cell's text; what a spreadsheet would compute gets an apostrophe before it."""
    line = visible(text)
    return f"'{line}" if _FORMULA.match(line) else line


def drawn(text: str) -> str:
    """Return a label for matplotlib, which reads formulas between dollars and hides `_names`."""
    line = visible(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line
