"""Memory that is allocated while something runs: by torch, by Python and numpy, and by the process as a whole."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def torch_peak(function: Callable[[], Any]) -> int:
    """Bytes that torch's allocator of the CPU held at most while ``function`` ran, over those it held before.

    Temporaries inside operators count as well, which a dispatch mode (`tests.live_bytes`) does not see. Memory that
    compiled kernels and numpy allocate does not: `python_peak` and `resident_peak` see that.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    # The public tables add up per operator; only the raw events are in the order in which they happened.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def python_peak(function: Callable[[], Any]) -> int:
    """Bytes of Python objects and numpy arrays that were alive at most while ``function`` ran, over those before."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def resident() -> int:
    """Bytes of memory that this process has now (Linux)."""
    return _status("VmRSS")


def resident_peak() -> int:
    """Most bytes of memory that this process has had since `reset_resident_peak` (Linux)."""
    return _status("VmHWM")


def reset_resident_peak() -> None:
    """Let `resident_peak` start from what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
