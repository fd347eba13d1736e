"""The errors kvdock raises on purpose; the command line prints them without a traceback."""

from __future__ import annotations


class KVDockError(Exception):
    """Report a problem the user can act on: what was found, what was expected, what to do."""


class OptionError(KVDockError):
    """Report an unknown option, or a value of the wrong type or out of range."""


class BudgetError(KVDockError):
    """Report a budget that cannot be read or cannot be met."""


class UnknownMethodError(KVDockError):
    """Report a method that is not installed."""


class MethodLoadError(KVDockError):
    """Report an installed method that cannot be loaded."""


class MethodConflictError(KVDockError):
    """Report two distributions that claim the same method id."""


class UnsupportedError(KVDockError):
    """Report a model, a setting or a way of generating that kvdock cannot serve correctly."""


class CompositionError(KVDockError):
    """Report methods that cannot be combined."""


class AccountingError(KVDockError):
    """Report held memory that differs from what the method's own formula predicts."""


def shown(value: object) -> str:
    """Return a value as an error quotes it: its repr, if Python can write it."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits
        return f"<a {type(value).__name__} too large to write>"
