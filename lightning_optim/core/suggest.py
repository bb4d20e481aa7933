"""Suggestions of similar names for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, options: Iterable[str], limit: int = 3) -> str:
    """Return a sentence that suggests the options most similar to ``given``, or lists all if none is similar.

    Example:
        >>> nearest("adamv", ["adamw", "sgd"])
        "Did you mean 'adamw'?"
        >>> nearest("adamv", ["radam", "adamw", "adam"])
        "Did you mean 'adam' or 'adamw' or 'radam'?"
        >>> nearest("zzz", ["adamw", "sgd"])
        "Available: 'adamw', 'sgd'."
    """
    options = list(dict.fromkeys(options))
    likeness = {option: _likeness(given.lower(), option.lower()) for option in options}
    close = sorted((o for o in options if likeness[o] >= (0.6, False)), key=likeness.__getitem__, reverse=True)[:limit]
    if close:
        return f"Did you mean {_quote(close, ' or ')}?"
    shown = sorted(options)
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    return f"Available: {_quote(shown[:40], ', ')}{more}."


def _likeness(given: str, option: str) -> tuple[float, bool]:
    """Return the fraction of common letters and whether the first letters agree, as typing errors rarely affect it."""
    return difflib.SequenceMatcher(None, option, given).ratio(), option[:1] == given[:1]


def _quote(names: Iterable[str], separator: str) -> str:
    return separator.join(repr(name) for name in names)
