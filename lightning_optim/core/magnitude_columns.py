"""The columns in which sizes of elements are counted, by powers of two: filled by `step`, shown by `diagnostics`."""

from __future__ import annotations

KINDS = ("grad", "param", "update")
"""What is counted: gradients before clipping, parameters after the step, and the change."""

FIRST, LAST = -40, 15
"""|x| in [2**e, 2**(e + 1)) is counted for e from `FIRST` to `LAST`: 9e-13 to 65536, beyond which fp16 is infinite."""

ZERO, BELOW = 0, 1
"""The columns of exact zeros, and of what is smaller than the first power."""

COLUMNS = LAST - FIRST + 5
"""How many columns there are."""

ABOVE, NOT_FINITE = COLUMNS - 2, COLUMNS - 1
"""The columns of what is larger than the last power, and of NaN and infinities."""
