"""Timing that holds on shared, noisy machines: candidates in turn, ratios within a round, medians over rounds."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds) * 1e3

    def over(self, other: Timing) -> float:
        """Median of the ratios round by round, which a slow minute of the machine does not move."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleave(candidates: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Times every candidate once per round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(warmup + rounds):
        for name, run in candidates.items():
            gc.disable()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            gc.enable()
            if round_ >= warmup:
                times[name].append(seconds)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def memory_copy(num_bytes: int) -> Callable[[], object]:
    """Moves ``num_bytes`` through memory, half of them read and half written: the limit of anything elementwise."""
    source = torch.ones(max(num_bytes // 8, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; numbers with three significant digits."""

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *[[cell(value) for value in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What the figures were measured on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numba"))
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {packages}"
