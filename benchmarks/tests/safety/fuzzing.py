"""Cases for the fuzz tests of this folder, and how many of them ran.

KVDOCK_FUZZ sets the cases of each test, KVDOCK_FUZZ_TOTAL how many there must have been in all.
"""

import functools
import os
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("KVDOCK_FUZZ", "20"))
TOTAL = int(os.environ.get("KVDOCK_FUZZ_TOTAL", "0"))
ran: Counter[str] = Counter()


def fuzz(*positional, label="", **named):
    """Run a test on CASES cases and count them."""

    def wrap(test):
        @functools.wraps(test)
        def counted(*given_, **more):
            ran[label or test.__name__] += 1
            test(*given_, **more)

        plain = settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return plain(given(*positional, **named)(counted))

    return wrap


ODD_TEXTS = st.sampled_from(
    ["", "\0", "../x", "/etc/passwd", "1e400", "nan", "-inf", "9" * 5000, "[" * 5000, "~nobody/x"]
)
texts = st.text(max_size=30) | ODD_TEXTS | st.text("0123456789.,%-+ekKMGiBtok/:[]{}", max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**30), 10**400])
    | st.floats()
    | texts
)
# neither Python nor hypothesis writes numbers of more than 4300 digits
huge = st.sampled_from([1, -1]).map(lambda sign: sign * 10**5000)
values = (
    scalars | huge | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
