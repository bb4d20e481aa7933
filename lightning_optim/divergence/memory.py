"""Where large data may be kept, and how much memory and disk is free for it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import psutil

from lightning_optim.core.suggest import nearest

MEMORIES = ("device", "cpu", "disk")
SHARE = 0.5
"""Largest share of the free memory that is taken: data loaders, caches and the peaks of training need some, too."""

_CGROUP = Path("/sys/fs/cgroup")


def check_memory(memory: str, whose: str) -> None:
    """Check that ``memory`` is one of `MEMORIES`.

    Args:
        memory: What was given.
        whose: The class whose argument it is, for the message.

    Raises:
        ValueError: It is none of them.
    """
    if memory not in MEMORIES:
        raise ValueError(f"Unknown memory={memory!r} of {whose}. {nearest(str(memory), MEMORIES)}")


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
    with contextlib.suppress(OSError, ValueError):  # no limit, which is written "max", or none of this kind
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    return None
