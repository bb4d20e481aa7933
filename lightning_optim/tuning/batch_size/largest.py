"""The largest batch that fits: each size in a short fit of its own, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.core.sizes import format_bytes

MOST = 8192
"""Where the search ends by itself; Lightning's finder ends there, too."""


@dataclass(frozen=True)
class Fit:
    """What came of a fit with one batch size.

    Args:
        size: The batch size asked for.
        status: "ok", "memory" (it did not fit), "data" (there are fewer samples) or "error".
        message: What the fit said, if it failed.
        memory: The most memory that it took, in bytes: reserved on the device, or resident on the host.
        samples_per_second: Its speed after the first step; None if it was not measured.
        found: All that `BatchProbe` has written.
    """

    size: int
    status: str
    message: str = ""
    memory: int | None = None
    samples_per_second: float | None = None
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Largest:
    """The largest batch that fits.

    Args:
        size: Its number of samples, per device; None if not even one sample fits.
        reason: What ended the search, as a clause.
        fits: All sizes that were tried, in order.
    """

    size: int | None
    reason: str
    fits: tuple[Fit, ...]


def largest_batch(try_size: Callable[[int], Fit], start: int, most: int = MOST) -> Largest:
    """Find the largest batch that fits, by doubling; where the first does not fit, by halving.

    Args:
        try_size: Runs a short fit with a batch size.
        start: The first size.
        most: The last size to be tried.

    Returns:
        The size, and all that were tried.

    Raises:
        ValueError: ``start`` is not from 1 to ``most``.
        RuntimeError: A fit failed for another reason than its size, which the message quotes.
    """
    if not 1 <= start <= most:
        raise ValueError(f"Invalid start={start!r}: must be from 1 to the last size to be tried, {most}.")
    fits: list[Fit] = []
    size, grows, best = start, True, None
    while True:
        fits.append(fit := try_size(size))
        if fit.status == "error":
            raise RuntimeError(f"The fit with batch size {size} failed:\n{fit.message}")
        if fit.status == "ok":
            best = size
            if not grows:
                return Largest(size, f"{2 * size} does not fit", tuple(fits))
            if (short := _shortage(fits)) is not None:
                return Largest(size, short, tuple(fits))
            if 2 * size > most:
                return Largest(size, f"the search ends at {most}", tuple(fits))
            size *= 2
        elif fit.status == "data":
            if best is not None or size == 1:
                return Largest(best, fit.message, tuple(fits))
            grows, size = False, size // 2
        elif best is not None or size == 1:
            return Largest(best, f"{size} does not fit: {fit.message}", tuple(fits))
        else:
            grows, size = False, size // 2


def _shortage(fits: Sequence[Fit]) -> str | None:
    """Why twice the batch is not tried on the host, which would end other processes before it says that it is full."""
    last = [fit for fit in fits if fit.status == "ok" and fit.memory is not None][-2:]
    if len(last) < 2 or last[-1].found.get("device") != "cpu" or (free := _available()) is None:
        return None
    (small, large) = (fit.memory or 0 for fit in last)
    needed = large + 2 * max(large - small, 0)
    if needed <= free:
        return None
    return f"{2 * last[-1].size} would take about {format_bytes(needed)} of the {format_bytes(free)} that are free"


def _available() -> int | None:
    """Memory of the host that a new process can have, in bytes; None where it cannot be known."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")), None)


def run_fit(
    args: Sequence[str],
    key: str,
    size: int,
    steps: int,
    *,
    accumulate: int | None = None,
    noise: bool = False,
    timeout: float | None = None,
) -> Fit:
    """Run a short fit in a process of its own, which a full memory may end.

    It is the command line rather than a job of `tuning.runs`: a strategy of several devices starts the other ranks by
    the command line of the process, and what is measured is a process of its own, not one with a server's imports.

    Args:
        args: The command line of the fit, after ``fit``.
        key: Flag of the batch size, without dashes: ``data.batch_size``.
        size: The batch size.
        steps: Number of optimizer steps.
        accumulate: Number of accumulated batches; None for that of the configuration.
        noise: Whether to measure what the gradient noise scale needs.
        timeout: Seconds after which the fit is ended; None for no limit.

    Returns:
        What came of it. It does not raise if the fit fails.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_optim_") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "lightning_optim.cli", "fit", *args]
        command += _overrides(folder, key, size, steps, accumulate)
        command += [
            f"--trainer.callbacks+={_PROBE}",
            f"--trainer.callbacks.path={path}",
            f"--trainer.callbacks.noise={str(noise).lower()}",
        ]
        # The child imports what this process would: its folder, and this copy of the package.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())}
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            _, said = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Fit(size, "memory", f"it took more than {timeout:g} s")
        finally:
            _end(child)
        found = json.loads(path.read_text()) if path.exists() else {}
    return _judge(size, child.returncode, said, found)


_PROBE = "lightning_optim.tuning.batch_size.probe.BatchProbe"


def _end(child: subprocess.Popen[str]) -> None:
    """End the child, and the workers that it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _import_path() -> Iterator[str]:
    package = Path(__file__).parents[3]
    yield str(package)
    yield from filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))


def _overrides(folder: str, key: str, size: int, steps: int, accumulate: int | None) -> list[str]:
    """Flags that make the fit short, and let it write into a folder of ours only."""
    flags = [
        f"--{key}={size}",
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.min_epochs=null",
        "--trainer.min_steps=null",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
    ]
    return flags if accumulate is None else [*flags, f"--trainer.accumulate_grad_batches={accumulate}"]


def _judge(size: int, code: int, said: str, found: dict[str, Any]) -> Fit:
    if code == 0 and found.get("status", "ok") == "ok":  # Without a batch, Lightning ends the fit before it begins.
        seen = found.get("size")
        if not found.get("steps") or (seen is not None and seen < size):
            count = "no whole batch" if seen is None else f"only {seen} samples"
            return Fit(size, "data", f"the training data have {count} for a batch of {size}", found=found)
        return Fit(size, "ok", "", found["memory"], found.get("samples_per_second"), found)
    if found.get("status") == "memory":
        return Fit(size, "memory", str(found["message"]).splitlines()[0], found=found)
    if code == -signal.SIGKILL:
        return Fit(size, "memory", "the process was killed, as the system does where memory is full")
    tail = "\n".join([line for line in said.strip().splitlines() if line.strip()][-5:])
    return Fit(size, "error", found.get("message") or tail or f"exit code {code}", found=found)
