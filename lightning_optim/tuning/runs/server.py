"""A process that starts jobs, one at a time, by forking: torch and Lightning are imported once for all of them.

It reads lines from its standard input and answers on its standard output. It starts no thread and touches no device,
so that a fork of it is as good as a fresh process. It ends, with its job, when its input does: with its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs.worker import begin, kill_group, own_group, work

_POLL = 0.03


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What an import prints is no answer.
    settings = json.loads(os.fdopen(os.dup(0), "rb", buffering=0).readline())
    sys.path[:] = settings["path"]
    if settings["fork"]:
        prepare(settings)
    rest = b""
    job: Any = None
    _say(answers, "ready")
    while True:
        if job is not None:
            status = _ended(job)
            if status is not None:
                job = None
                _say(answers, f"exit {status}")
        if not select.select([0], [], [], _POLL if job is not None else None)[0]:
            continue
        part = os.read(0, 1 << 16)
        if not part:
            if job is not None:
                kill_group(job if isinstance(job, int) else job.pid)
            return
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            command, _, argument = line.decode().partition(" ")
            if command == "start":
                job = _start(Path(json.loads(argument)), settings)
                _say(answers, "started")
            elif command == "kill" and job is not None:
                kill_group(job if isinstance(job, int) else job.pid)


def prepare(settings: dict[str, Any]) -> None:
    """Import what jobs need."""
    for name in settings["preload"]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:  # The job that needs it will say so.
            pass
        except Exception:
            traceback.print_exc()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(settings["threads"])


def _start(folder: Path, settings: dict[str, Any]) -> Any:
    """Start a job; return what `_ended` takes: its process id, or its process where there is no fork."""
    if not settings["fork"]:
        command = [sys.executable, "-m", "lightning_optim.tuning.runs.server", str(folder), json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in settings["path"] if path)}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    parent = os.getpid()
    pid = os.fork()
    if pid:
        own_group(pid)  # here as well, so that it has one before it can be ended
        return pid
    code = 1
    try:
        begin(folder, parent)
        code = work(folder)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ended(job: Any) -> int | None:
    """Return the exit code of a job, negative for a signal; None while it runs."""
    if not isinstance(job, int):
        code: int | None = job.poll()
        return code
    pid, status = os.waitpid(job, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _say(answers: Any, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        answers.write(line + "\n")
        answers.flush()


def run_one(folder: str, settings: str) -> None:
    """Run one job in this process, which was started for it."""
    begin(Path(folder), os.getppid())
    prepare(json.loads(settings))
    code = work(Path(folder))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_one(sys.argv[1], sys.argv[2])
    else:
        main()
