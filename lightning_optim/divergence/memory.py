"""Where something large may be kept, and how much memory and disk there is for it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import psutil

from lightning_optim.core.suggest import nearest

MEMORIES = ("device", "cpu", "disk")
SHARE = 0.5
"""More of what is free is not taken: data loaders, caches and the peaks of training want some as well."""

_CGROUP = Path("/sys/fs/cgroup")


def check_memory(memory: str, whose: str) -> None:
    """Refuses what is none of `MEMORIES`.

    Args:
        memory: What was given.
        whose: Of what it is, for the message.

    Raises:
        ValueError: It is none.
    """
    if memory not in MEMORIES:
        raise ValueError(f"Unknown memory={memory!r} of {whose}. {nearest(str(memory), MEMORIES)}")


def free_memory() -> int:
    """Bytes of the machine's memory that can be had without swapping, within the container's limit."""
    available: int = psutil.virtual_memory().available
    container = _of_container()
    return available if container is None else min(available, container)


def free_disk(folder: str | Path | None = None) -> int:
    """Bytes free in the file system of ``folder``; None for the folder of temporary files."""
    return shutil.disk_usage(folder or tempfile.gettempdir()).free


def fits_in_memory(need: int, free: int, sharers: int = 1) -> bool:
    """Whether a process may take ``need`` bytes where ``free`` are, and ``sharers`` processes do the same.

    Example:
        >>> fits_in_memory(10, free=100), fits_in_memory(10, free=100, sharers=8)
        (True, False)
    """
    return need * max(sharers, 1) <= SHARE * free


def _of_container() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # no limit, which is written "max", or none of this kind
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    return None
