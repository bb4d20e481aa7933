"""Where a warning comes from, for the one who reads it: the code outside of this package."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])


def depth_outside() -> int:
    """Return the ``stacklevel`` with which the caller's warning points at the first frame outside of this package.

    Example:
        >>> depth_outside()  # of a doctest, which is outside
        1
    """
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    return depth
