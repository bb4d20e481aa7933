"""Wording shared by error messages: what was given, what is needed, what is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, options: Iterable[str], limit: int = 3) -> str:
    """A sentence naming the options most like ``given``, or all of them if none is alike.

    Example:
        >>> nearest("adamv", ["adamw", "sgd"])
        "Did you mean 'adamw'?"
        >>> nearest("zzz", ["adamw", "sgd"])
        "Available: 'adamw', 'sgd'."
    """
    options = list(dict.fromkeys(options))
    lowered = {option.lower(): option for option in options}
    close = [lowered[match] for match in difflib.get_close_matches(given.lower(), lowered, n=limit, cutoff=0.6)]
    if close:
        return f"Did you mean {_quote(close, ' or ')}?"
    shown = sorted(options)
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    return f"Available: {_quote(shown[:40], ', ')}{more}."


def _quote(names: Iterable[str], separator: str) -> str:
    return separator.join(repr(name) for name in names)
