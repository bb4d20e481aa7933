"""How a command ends with an error: a few lines on stderr, and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

MOST_LINES = 6
"""Largest number of lines of a message."""


def fail(text: str, code: int = 1) -> NoReturn:
    """Print an error and exit.

    Args:
        text: The message; what is beyond six lines is left out.
        code: The exit code.

    Raises:
        SystemExit: Always.
    """
    sys.stdout.flush()
    print(f"error: {capped(text, MOST_LINES)}", file=sys.stderr)
    raise SystemExit(code)


def said_of(error: BaseException) -> str:
    """Return the message of an exception; that of the operating system begins with the file.

    Example:
        >>> said_of(OSError(28, "No space left on device", "runs/log.txt"))
        'runs/log.txt: No space left on device.'
    """
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}."
    return str(error) or type(error).__name__


def capped(text: str, count: int) -> str:
    """Return the first lines of a message, and how many were left out.

    Args:
        text: The message.
        count: Largest number of lines.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if len(lines) > count:
        lines = [*lines[: count - 1], f"... and {len(lines) - count + 1} lines more: --debug shows all."]
    return "\n".join(lines)
