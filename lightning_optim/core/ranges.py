"""Ranges of numbers, and their description in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """Range of a hyperparameter, or of each element of a tuple. NaN is not in any range.

    Args:
        low: The smallest number.
        high: The largest number.
        above: Whether ``low`` itself is excluded.
        below: Whether ``high`` itself is excluded.
        whole: Whether only integers, of type int, are allowed.
        optional: Whether None is allowed.
        tensor: Whether a one-element tensor, which a scheduler may fill, is allowed.

    Example:
        >>> fraction = Range(0, 1, below=True)
        >>> 0.9 in fraction, 1.0 in fraction, float("nan") in fraction
        (True, False, False)
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False
    tensor: bool = True

    def __contains__(self, value: float) -> bool:
        above_low = self.low < value if self.above else self.low <= value
        below_high = value < self.high if self.below else value <= self.high
        return above_low and below_high

    def needed(self, name: str) -> str:
        """Describe the valid values of the hyperparameter ``name``, to follow the words "must be"."""
        low, high = not math.isinf(self.low), not math.isinf(self.high)
        finite = (self.below or high) and (self.above or low)
        kind = "a whole number" if self.whole else "a finite number" if finite else "a number"
        if low and high and self.whole:
            text = f"{kind} from {self.low:g} to {self.high:g}"
        elif low and high:
            text = f"{self.low:g} {'<' if self.above else '<='} {name} {'<' if self.below else '<='} {self.high:g}"
        elif low:
            text = f"{kind} {'above' if self.above else 'of at least'} {self.low:g}"
        elif high:
            text = f"{kind} {'below' if self.below else 'of at most'} {self.high:g}"
        else:
            text = kind
        text = text.removeprefix("a number of ")
        return f"{text} or None" if self.optional else text


NON_NEGATIVE = Range(0, below=True)
"""A finite number of at least 0."""
FRACTION = Range(0, 1, below=True, tensor=False)
"""In [0, 1): an average with a decay rate of 1 would never change, which is a mistake."""
FINITE = Range(above=True, below=True)
"""Any finite number."""


def ranges_of(owner: type) -> dict[str, Range]:
    """Return the ranges that a class declares as `ranges` and inherits, by name of the hyperparameter.

    Example:
        >>> class Base:
        ...     ranges = {"lr": NON_NEGATIVE}
        >>> class Own(Base):
        ...     ranges = {"beta": FRACTION}
        >>> sorted(ranges_of(Own))
        ['beta', 'lr']
    """
    merged: dict[str, Range] = {}
    for base in reversed(owner.__mro__):
        declared = vars(base).get("ranges", {})
        if isinstance(declared, Mapping):  # another package's class may mean something else by the name
            merged |= {name: allowed for name, allowed in declared.items() if isinstance(allowed, Range)}
    return merged
