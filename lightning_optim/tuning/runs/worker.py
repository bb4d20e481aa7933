"""The side of a job's process: call the target, and write down how it ended."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from lightning_optim.tuning.runs.job import JOB_FILE, read_arguments
from lightning_optim.tuning.runs.result import FAILED, FINISHED, OUT_OF_MEMORY, summarise, write_result

LOG_FILE = "log.txt"
IN_JOB = "LIGHTNING_OPTIM_JOB"
"""Variable of the environment by which a process knows that it is a job."""
_TAIL = 6
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


def work(folder: Path) -> int:
    """Run the job of a folder, and write its result.

    Args:
        folder: Folder of the job.

    Returns:
        The exit code of the process: 0 if the job ran to its end.
    """
    name = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["name"]
    status, error = FINISHED, ""
    try:
        target, arguments = read_arguments(folder)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(folder, **arguments)
    except BaseException as exception:
        traceback.print_exc()
        status, error = how_it_failed(exception)
        if isinstance(exception, SystemExit):
            if exception.code in (None, 0):
                status, error = FINISHED, ""
            else:
                error = _end_of_log(folder) or error
    sys.stdout.flush()
    sys.stderr.flush()
    write_result(summarise(name, folder, status, error))
    return int(status != FINISHED)


def how_it_failed(exception: BaseException) -> tuple[str, str]:
    """Return status and message of a job that raised.

    Example:
        >>> how_it_failed(ValueError("no such file"))
        ('failed', 'ValueError: no such file')
    """
    text = str(exception).strip()
    memory = isinstance(exception, MemoryError) or type(exception).__name__ == "OutOfMemoryError"
    memory |= isinstance(exception, RuntimeError) and any(sign in text.lower() for sign in _MEMORY)
    lines = f"{type(exception).__name__}: {text}".splitlines()[:_TAIL]
    return (OUT_OF_MEMORY if memory else FAILED), "\n".join(lines)


def _end_of_log(folder: Path) -> str:
    """Return what a program has said before it exited: the lines from its `error:` on."""
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    start = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=None)
    return "" if start is None else "\n".join(lines[start : start + _TAIL]).split("\nTraceback")[0]


def begin(folder: Path, parent: int) -> None:
    """Make this process the job's: a group of its own, output into its log, and an end with its parent.

    Args:
        folder: Folder of the job.
        parent: Process that started it.
    """
    os.environ[IN_JOB] = str(folder)
    own_group(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends it.
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(empty)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    kill_group(os.getpid())


def own_group(pid: int) -> None:
    """Put a process, 0 for this one, into a group of its own, which is ended as a whole."""
    if hasattr(os, "setpgid"):
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)


def kill_group(pid: int) -> None:
    """End a process and the children of its group at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
