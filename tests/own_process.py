"""Work that may end its process, done in one of its own, which writes down what it is at."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Journal:
    """A file that holds what is being done now, even when that ends the process.

    Args:
        path: Written at once, without buffers of our own.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(self, doing: str) -> None:
        """Put ``doing`` in the place of what was there."""
        text = doing.encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))


def begin(path: str) -> Journal:
    """What a worker does first: show where it dies, and keep the journal at ``path``."""
    faulthandler.enable()
    return Journal(path)


def run_module(module: str, journal: Path, *arguments: str, timeout: float = 250, **environment: str) -> str:
    """Run ``python -m module journal arguments``; what it printed.

    Raises:
        AssertionError: It died, or failed; says by which signal, at what, and what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, str(journal), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        end = f"died of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else "failed"
        doing = journal.read_text() if journal.exists() else "its start"
        raise AssertionError(f"{module} {end}, at:\n{doing}\n\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done.stdout


if __name__ == "__main__":  # to see that a death is noticed
    begin(sys.argv[1]).write("an abort")
    os.abort()
