"""The parent's side of a place in which jobs run, one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_optim.tuning.runs.worker import kill_group

PRELOAD = (
    "lightning.pytorch",
    "torch.utils.tensorboard",
    "lightning_optim.tuning.runs.python_fit",
    "matplotlib.figure",
    "numba.typed.typeddict",
)
"""What a fit may import."""


class Slot:
    """A server process, its environment, and the job that it runs.

    Args:
        threads: Number of threads of a job.
        device: What ``CUDA_VISIBLE_DEVICES`` is to be; None to leave it.
        preload: Modules that jobs import, imported once for all of them.
    """

    def __init__(self, threads: int, device: str | None = None, preload: Sequence[str] = PRELOAD) -> None:
        self._threads, self._device, self._preload = threads, device, preload
        self._server: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.folder: Path | None = None
        """Folder of the job that runs; None if none does."""
        self.started: float | None = None
        """When the job started, by `time.monotonic`; None before."""

    def start(self, folder: Path) -> None:
        """Start the job of a folder."""
        if self._server is None or self._server.poll() is not None:
            self._open()
        assert self._server is not None
        assert self._server.stdin is not None
        self.folder, self.started = folder, None
        with contextlib.suppress(BrokenPipeError):  # `poll` will find that the server has ended.
            self._server.stdin.write(f"start {json.dumps(str(folder))}\n".encode())
            self._server.stdin.flush()

    def poll(self) -> int | None:
        """Return the exit code of the job, negative for a signal; None while it runs."""
        assert self._server is not None
        assert self._server.stdout is not None
        while True:
            try:
                part = os.read(self._server.stdout.fileno(), 1 << 12)
            except BlockingIOError:
                break
            if not part:
                self.folder = None
                code = self._server.wait()
                return code or -9
            self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line == b"started":
                self.started = time.monotonic()
            if line.startswith(b"exit "):
                self.folder = None
                return int(line[5:])
        return None

    def stop(self) -> None:
        """End the job at once; `poll` returns its exit code then."""
        if self._server is not None and self._server.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.write(b"kill\n")
                self._server.stdin.flush()

    def close(self) -> None:
        """End job and server."""
        if self._server is None:
            return
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            kill_group(self._server.pid)
            self._server.wait()
        self._server.stdout.close()
        self._server, self.folder = None, None

    def _open(self) -> None:
        threads = str(self._threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        path = [str(Path.cwd()) if entry == "" else entry for entry in sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if self._device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._device
        self._rest = b""
        self._server = subprocess.Popen(
            [sys.executable, "-m", "lightning_optim.tuning.runs.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's, which ends the jobs.
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        os.set_blocking(self._server.stdout.fileno(), False)
        settings = {
            "path": path,
            "threads": self._threads,
            # CUDA does not survive a fork, nor do some libraries of macOS; where there is a device, a job is long
            # enough for imports of its own.
            "fork": sys.platform == "linux" and not self._device,
            "preload": list(self._preload),
        }
        self._server.stdin.write(json.dumps(settings).encode() + b"\n")
        self._server.stdin.flush()


def environment_of(devices: Sequence[int] | None, workers: int, given: Mapping[str, str] | None = None) -> list[str]:
    """Return ``CUDA_VISIBLE_DEVICES`` of each worker.

    Args:
        devices: Indices of the visible GPUs to use; None or empty for the CPU, for which all are hidden.
        workers: Number of workers.
        given: The environment; None for that of this process.

    Example:
        >>> environment_of([0, 1], 4, {"CUDA_VISIBLE_DEVICES": "6,7"})
        ['6', '7', '6', '7']
    """
    if not devices:
        return [""] * workers
    visible = (os.environ if given is None else given).get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name] or [str(i) for i in range(max(devices) + 1)]
    return [names[devices[i % len(devices)]] for i in range(workers)]
