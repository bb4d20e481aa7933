"""Targets of jobs that need no torch."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from lightning_optim.tuning.runs.records import CURVE_FILE, VALIDATION_FILE


def write(folder: Path, loss: float = 1.0, pause: float = 0.0, seed: int = 0) -> None:
    """Write records as a fit does, with a pause between validations."""
    with (folder / CURVE_FILE).open("w") as file:
        file.write("step,seconds,train_loss\n")
        file.writelines(f"{step},{step / 10},{loss}\n" for step in range(1, 21))
    with (folder / VALIDATION_FILE).open("w") as file:
        for step in range(5):
            line = {"step": step, "seconds": step / 10, "epoch": 0, "metrics": {"val_loss": loss}}
            file.write(json.dumps(line) + "\n")
            file.flush()
            time.sleep(pause)


def fail(folder: Path) -> None:
    raise ValueError("no such thing")


def exhaust(folder: Path) -> None:
    raise RuntimeError("CUDA out of memory")


def die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def surroundings(folder: Path) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    (folder / "surroundings").write_text(" ".join(os.environ[name] for name in names))
