"""A lock on a folder, by which other processes see that something runs in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def require_posix() -> None:
    """Refuse a system without the locks and process groups that jobs need.

    Raises:
        NotImplementedError: The system is neither Linux nor macOS.
    """
    if os.name != "posix":
        raise NotImplementedError("Jobs in processes of their own need Linux or macOS.")


def lock(folder: Path, what: str) -> IO[str]:
    """Lock a folder until the returned file is closed, or this process ends, however it does.

    Args:
        folder: The folder, which exists.
        what: What runs in it, for the message of the others.

    Returns:
        The open file, which is also a context.

    Raises:
        FileExistsError: Another process has locked it.
        NotImplementedError: The system is neither Linux nor macOS.
    """
    require_posix()
    import fcntl  # Windows does not have it.

    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FileExistsError(
            f"Another process runs {what} in {folder} at this moment: wait for it, or give another folder."
        ) from None
    return file
