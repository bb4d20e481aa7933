"""Files of a run in its folder, which may be on a remote file system (``s3://``, ``gs://``), as checkpoints are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def write_file(folder: str | Path, name: str, content: bytes) -> Path | str:
    """Write a file as a whole: after an error there is the former file of that name, or none.

    Args:
        folder: Local folder or URL that fsspec knows; created if it does not exist.
        name: Name of the file, with "/" between the parts of a path.
        content: Its content.

    Returns:
        The path; of a remote file its URL.

    Raises:
        OSError: The file cannot be written. A remote file system may raise errors of its own.
    """
    files, root = url_to_fs(str(folder))
    if not isinstance(files, LocalFileSystem):
        target = f"{root.rstrip('/')}/{name}"
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        with files.open(target, "wb") as file:
            file.write(content)
        return str(files.unstrip_protocol(target))
    path = Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    return path


def check_folder(folder: str | Path) -> str:
    """Check that files can be written to a folder, without leaving anything there.

    Of a remote folder only its file system is looked up. A local folder that does not exist is not created: the nearest
    one that exists is tried.

    Args:
        folder: Local folder or URL that fsspec knows.

    Returns:
        The path of the folder in its file system.

    Raises:
        OSError: A file cannot be written there.
        ImportError: The package for the file system is not installed.
        ValueError: There is no such file system.
    """
    files, root = url_to_fs(str(folder))
    if isinstance(files, LocalFileSystem):
        present = Path(root)
        while not present.exists() and present != present.parent:
            present = present.parent
        with tempfile.TemporaryFile(dir=present) as file:
            file.write(b"1")
    return str(root)
