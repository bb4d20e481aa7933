"""Where something large may be kept, and how much memory and disk there is for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from lightning_optim.core.suggest import nearest

MEMORIES = ("device", "cpu", "disk")
SHARE = 0.5
"""More of what is free is not taken: data loaders, caches and the peaks of training want some as well."""

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


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


def free_memory() -> int | None:
    """Bytes of the machine's memory that can be had without swapping, within the container's limit; None if unknown."""
    return min((free for free in (_of_machine(), _of_container()) if free is not None), default=None)


def free_disk(folder: str | Path | None = None) -> int:
    """Bytes free where a folder is; None for that of temporary files."""
    return shutil.disk_usage(folder or tempfile.gettempdir()).free


def fits(need: int, free: int | None, sharers: int = 1) -> bool:
    """Whether so many bytes are within what each of so many processes may take; yes if nothing is known.

    Example:
        >>> fits(10, free=100), fits(10, free=100, sharers=8)
        (True, False)
    """
    return free is None or need * max(sharers, 1) <= SHARE * free


def said(count: float) -> str:
    """Bytes for people.

    Example:
        >>> said(84e9)
        '84 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _of_machine() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # not Linux
        (line,) = (line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_container() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # no limit, which is written "max", or none of this kind
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    return None
