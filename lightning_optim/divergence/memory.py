"""The places where large data can be kept, and the free memory and disk space for it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

MEMORIES = ("device", "cpu", "disk")
CHOICES = ("auto", *MEMORIES)
"""With that of the host if there is room for them, else none."""
SHARE = 0.5
"""Largest share of the free memory to use: data loaders, caches and the peaks of training need some as well."""

_CGROUP = Path("/sys/fs/cgroup")


def check_memory(memory: str, whose: str, choices: Sequence[str] = MEMORIES) -> None:
    """Check that ``memory`` is one of those that there are.

    Args:
        memory: The value to check.
        whose: Name of the class whose argument it is, for the message.
        choices: Those that there are.

    Raises:
        ValueError: ``memory`` is none of them.
    """
    if memory not in choices:
        known = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"Invalid memory={memory!r} of {whose}: must be {known} or {choices[-1]!r}.")


def free_memory() -> int:
    """Return the bytes of memory that are available without swapping, within the limit of the container."""
    available: int = psutil.virtual_memory().available
    container = _of_container()
    return available if container is None else min(available, container)


def free_disk(folder: str | Path | None = None) -> int:
    """Return the bytes free in the file system of ``folder``; None for the folder of temporary files."""
    return shutil.disk_usage(folder or tempfile.gettempdir()).free


def fits_in_memory(need: int, free: int, sharers: int = 1) -> bool:
    """Return whether ``sharers`` processes may take ``need`` bytes each, of ``free`` in all.

    Example:
        >>> fits_in_memory(10, free=100), fits_in_memory(10, free=100, sharers=8)
        (True, False)
    """
    return need * max(sharers, 1) <= SHARE * free


def _of_container() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # The limit may be "max", and cgroup files may not exist.
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    return None
