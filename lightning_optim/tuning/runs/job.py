"""What a job is: a function with its arguments, for a process and a folder of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import runpy
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs.description import describe, digest

JOB_FILE = "job.json"
"""Description of a job, in its folder."""
ARGUMENTS_FILE = "arguments.pkl"


@dataclass(frozen=True)
class Job:
    """A function that trains, its arguments, and the name of the folder for all that it writes.

    Args:
        name: Name, and path of its folder below that of all jobs: ``"adamw/seed_0"``.
        target: ``"module:function"``, called as ``function(folder, **arguments)`` in a process of its own.
        arguments: Arguments of the target, which can be pickled.
        description: What makes this job another job, as data for JSON; None for its arguments. A finished job is not
            run again as long as its description is the same. Times and places do not belong here.
        steps: Number of optimizer steps, for the progress bar; None if it is not known.
        timeout: Seconds after which the process is ended; None for no limit.

    Raises:
        ValueError: The name is no relative path, or the target is not of the form ``module:function``.

    Example:
        >>> Job("adamw/seed_0", "my.jobs:train", {"seed": 0}).hash == Job("b", "my.jobs:train", {"seed": 0}).hash
        True
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] | None = None
    steps: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        parts = Path(self.name).parts
        if not parts or Path(self.name).is_absolute() or ".." in parts:
            raise ValueError(f"Invalid name={self.name!r}: must be a relative path, for instance 'adamw/seed_0'.")
        if not re.fullmatch(r"[\w.]+:\w+", self.target):
            raise ValueError(f"Invalid target={self.target!r}: must be 'module:function'.")

    @property
    def hash(self) -> str:
        """Digest of what is to be done, by which a job is recognised when a study is resumed."""
        what = self.arguments if self.description is None else self.description
        return digest({"target": self.target, "what": describe(what)})

    def write(self, folder: Path) -> None:
        """Write all that the process needs into the job's folder.

        Args:
            folder: Folder of the job, which exists.

        Raises:
            TypeError: The arguments cannot be sent to another process.
        """
        content, needs_main = dump(dict(self.arguments), self.name)
        (folder / ARGUMENTS_FILE).write_bytes(content)
        what = self.arguments if self.description is None else self.description
        job = {"name": self.name, "target": self.target, "hash": self.hash, "description": describe(what)}
        if needs_main and (main := main_file()):
            job["main"] = main
        write_json(folder / JOB_FILE, job)


def read_arguments(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return target and arguments of the job in a folder."""
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    if job.get("main"):
        _load_main(job["main"])
    arguments: dict[str, Any] = pickle.loads((folder / ARGUMENTS_FILE).read_bytes())
    return job["target"], arguments


def _load_main(path: str) -> None:
    """Run the user's program as the module ``__mp_main__``, as `multiprocessing` does, for what it defines."""
    main: Any = types.ModuleType("__mp_main__")
    main.__dict__.update(runpy.run_path(path, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main


def written_hash(folder: Path) -> str | None:
    """Return the hash of the job that was written into a folder; None without one."""
    try:
        found = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError):
        return None
    return str(found)


def dump(value: Any, name: str) -> tuple[bytes, bool]:
    """Return ``value`` pickled, and whether to read it takes the program that runs now.

    With ``cloudpickle``, if it is installed, functions of a program or notebook are pickled as well.

    Args:
        value: What to send to another process.
        name: Name of the job, for the message.

    Raises:
        TypeError: It cannot be pickled.
    """
    try:
        dumps, more = importlib.import_module("cloudpickle").dumps, ""
    except ModuleNotFoundError:
        dumps, more = pickle.dumps, ", or install cloudpickle, which also takes functions of a notebook"
    try:
        content = dumps(value)
    except Exception as error:
        raise TypeError(
            f"The arguments of job {name!r} cannot be sent to a process of its own ({type(error).__name__}: {error}). "
            f"Give functions and classes that a module defines{more}."
        ) from error
    return bytes(content), dumps is pickle.dumps and b"__main__" in content


def main_file() -> str | None:
    """Return the file of the program that runs, whose functions a job may need; None for a module or a notebook."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or not Path(path).is_file():
        return None
    return str(Path(path).resolve())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece: a reader finds the old content or the new one.

    Raises:
        OSError: The file cannot be written, as on a full disk; the old content is still there.
    """
    text = io.StringIO()
    json.dump(content, text, indent=1)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text.getvalue(), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        # A write that fails does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
