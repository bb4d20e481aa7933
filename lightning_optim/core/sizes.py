"""Numbers of bytes for people."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """``count`` bytes with three digits and a decimal unit.

    Example:
        >>> format_bytes(84e9), format_bytes(1536)
        ('84 GB', '1.54 kB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
