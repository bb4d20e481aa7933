"""A TensorBoard server, for tests that look at it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tensorboard(folder: Path, run: str) -> Iterator[str]:
    """The address of a server of the runs in a folder, which has found the run when it is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", ".", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                runs = urllib.request.urlopen(f"{url}/data/runs").read()
            except OSError:
                runs = b""
            if run.encode() in runs:
                break
            time.sleep(0.5)
        else:
            pytest.fail("TensorBoard does not answer")
        yield url
    finally:
        server.kill()
        server.wait()
