"""Suggestions of similar names for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, options: Iterable[str], limit: int = 3, also: Iterable[str] = ()) -> str:
    """Return a sentence that suggests the options most similar to ``given``, or lists all if none is similar.

    Similar is what a typing error makes of an option: few of its letters differ, in short names one or two. An option
    that is a part of ``given`` is similar as well (`warmup_steps` and `warmup`). What is in ``also`` is suggested, but
    not listed.

    Example:
        >>> nearest("adamv", ["adamw", "sgd"])
        "Did you mean 'adamw'?"
        >>> nearest("adamv", ["radam", "adamw", "adam"])
        "Did you mean 'adam' or 'adamw'?"
        >>> nearest("zzz", ["adamw", "sgd"])
        "Available: 'adamw', 'sgd'."
        >>> nearest("scion", ["lion", "sgd"])
        "Available: 'lion', 'sgd'."
    """
    options = list(dict.fromkeys(options))
    likeness = {option: _likeness(given.lower(), option.lower()) for option in [*options, *also]}
    alike = [o for o in likeness if likeness[o] >= (0.6, False) and _is_near(given.lower(), o.lower())]
    close = sorted(alike, key=likeness.__getitem__, reverse=True)[:limit]
    if close:
        return f"Did you mean {_quote(close, ' or ')}?"
    shown = sorted(options)
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    return f"Available: {_quote(shown[:40], ', ')}{more}."


def _likeness(given: str, option: str) -> tuple[float, bool]:
    """Return the fraction of common letters and whether the first letters agree, as typing errors rarely affect it."""
    return difflib.SequenceMatcher(None, option, given).ratio(), option[:1] == given[:1]


def _is_near(given: str, option: str) -> bool:
    """Return whether ``given`` may be ``option`` with typing errors: one in four letters, and two at least.

    Of short names two letters are half, so there the first letter has to agree, or only one may differ.
    """
    if option in given or given in option:
        return True
    errors = _errors(given, option)
    return errors <= max(2, len(option) // 4) and (len(option) > 5 or errors < 2 or option[:1] == given[:1])


def _errors(given: str, option: str) -> int:
    """Return the least number of letters to insert, delete, replace or swap with the next to make one of the other."""
    before: list[int] = []
    last = list(range(len(option) + 1))
    for i, letter in enumerate(given, 1):
        row = [i]
        for j, other in enumerate(option, 1):
            least = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == option[j - 2] and given[i - 2] == other:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        before, last = last, row
    return last[-1]


def _quote(names: Iterable[str], separator: str) -> str:
    return separator.join(repr(name) for name in names)
