"""Ranges of numbers, with the words for them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a hyperparameter may be; of a tuple, that each of its parts may be. NaN is in no range.

    Args:
        low: The smallest number.
        high: The largest number.
        above: Exclude ``low`` itself.
        below: Exclude ``high`` itself.
        whole: Allow whole numbers only, of type int.
        optional: Allow None, too.
        tensor: Allow a one-element tensor, which a scheduler may fill, too.

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
        """What the hyperparameter ``name`` must be, in words."""
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
"""In [0, 1): an average that never takes anything in, or never forgets, is a mistake."""
FINITE = Range(above=True, below=True)
"""Any finite number."""
