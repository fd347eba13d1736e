"""Read JSON of strangers: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any


def read_json(text: str | bytes) -> Any:
    """Return the content; raises ValueError also for NaN, infinite numbers and deep nesting."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_texts(text: str | bytes) -> Any:
    """Return the content as `read_json`, but refuse half characters, which no tokenizer takes."""
    content = read_json(text)
    # the ValueError names the place
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.20} is too large")
    return number
