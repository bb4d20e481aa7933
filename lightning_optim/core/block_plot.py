"""Areas of block characters: pictures in a terminal, an eighth of a line exact."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_rows"]

_BLOCKS = " ▁▂▃▄▅▆▇█"


def block_rows(shares: Sequence[float], rows: int) -> list[str]:
    """Return the lines of an area, the highest first, a column for each value.

    Args:
        shares: Height of each column, as a share of the whole height in [0, 1].
        rows: Number of lines.

    Example:
        >>> block_rows([0.25, 1.0], 2)
        [' █', '▄█']
    """
    heights = [round(share * rows * 8) for share in shares]
    return ["".join(_BLOCKS[min(max(h - 8 * row, 0), 8)] for h in heights) for row in reversed(range(rows))]
