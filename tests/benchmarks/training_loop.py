"""AdamW in a loop with a real backward pass, as a user runs it: in processes whose environment is said.

What a step costs there differs from steps in a row: the backward pass leaves its own data in the caches, and torch's
OpenMP threads spin for a while after each of its operations, or sleep with ``OMP_WAIT_POLICY=PASSIVE``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import lightning_optim as lo
from tests.benchmarks.timing import Timing, memory_copy, table

SIZES = {"3.2 M": (12, 512), "25 M": (24, 1024)}
"""Layers and width of each model, whose batches are 64 rows."""

ENVIRONMENTS = {"default": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}, "one core busy": {}}
SECONDS = 20.0
"""Time after which a measurement ends, with at least three rounds: under load a single step can take seconds."""


def model(layers: int, width: int) -> nn.Module:
    """Linear, LayerNorm and GELU, so many times."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()) for _ in range(layers))
    )


def ours(params: list[nn.Parameter]) -> Callable[[], object]:
    """The update alone."""
    return lo.optim.AdamW(params, lr=1e-4).step


def torchs(params: list[nn.Parameter]) -> Callable[[], object]:
    """The update alone."""
    return torch.optim.AdamW(params, lr=1e-4, fused=True).step


def ours_with_everything(params: list[nn.Parameter]) -> Callable[[], object]:
    """The norm of all gradients, clipping, a skip flag and all sums."""
    optimizer = lo.optim.AdamW(params, lr=1e-4)
    optimizer.collect_step_stats = True
    optimizer.found_inf = torch.zeros(())

    def step() -> None:
        norm_sq = lo.kernels.measure([p.grad for p in params if p.grad is not None])
        optimizer.divisor = norm_sq.sum().sqrt().clamp(min=1.0)
        optimizer.step()

    return step


def torchs_with_clipping(params: list[nn.Parameter]) -> Callable[[], object]:
    """Clipping, and neither a flag nor sums."""
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


CANDIDATES = {
    "torch fused": torchs,
    "ours": ours,
    "torch fused, clip_grad_norm_": torchs_with_clipping,
    "ours: clip + skip + all sums": ours_with_everything,
}


def measure(layers: int, width: int, rounds: int = 40, warmup: int = 5) -> dict[str, Timing]:
    """Time each candidate's step and its ``zero_grad``, forward and backward pass, once per round.

    Returns:
        Timings by candidate; those of the passes under "loop of ..."; and that of a copy of 28 bytes per parameter.
    """
    models = {name: model(layers, width) for name in CANDIDATES}
    steps = {name: make(list(models[name].parameters())) for name, make in CANDIDATES.items()}
    batch = torch.randn(64, width)
    copy = memory_copy(28 * sum(p.numel() for p in models["ours"].parameters()))
    times: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times.setdefault(name, []).append(time.perf_counter() - start)

    def passes(module: nn.Module) -> None:
        module.zero_grad()
        module(batch).square().mean().backward()

    gc.disable()
    start = time.perf_counter()
    for round_ in range(warmup + rounds):
        if round_ == warmup:
            times.clear()
        for name, step in steps.items():
            timed(f"loop of {name}", lambda name=name: passes(models[name]))  # type: ignore[misc]
            timed(name, step)
        timed("copy", copy)
        if time.perf_counter() - start > SECONDS and round_ >= warmup + 2:
            break
    gc.enable()
    return {name: Timing(tuple(values)) for name, values in times.items()}


def adamw_in_a_loop() -> str:
    """AdamW against torch's fused one behind a backward pass, in the default environment and in two others."""
    rows: list[list[object]] = []
    for environment, variables in ENVIRONMENTS.items():
        for size in SIZES:
            timings = _in_own_process(size, variables, busy="busy" in environment)
            alone, everything, copied = timings["ours"], timings["ours: clip + skip + all sums"], timings["copy"]
            fused, clipped = timings["torch fused"], timings["torch fused, clip_grad_norm_"]
            row: list[object] = [environment, size, fused.ms, alone.ms, alone.over(fused), alone.over(copied)]
            row += [clipped.ms, everything.ms, everything.over(clipped)]
            rows.append([*row, timings["loop of torch fused"].ms, timings["loop of ours"].ms])
            print("  " + " ".join(str(cell) for cell in rows[-1]), flush=True)
    header = ["environment", "parameters", "torch fused, ms", "ours, ms", "ratio", "ours over a copy of 28 bytes"]
    header += ["torch fused, clip_grad_norm_, ms", "ours: clip + skip + all sums, ms", "ratio"]
    return table([*header, "passes before torch's step, ms", "before ours, ms"], rows)


def _in_own_process(size: str, variables: dict[str, str], busy: bool) -> dict[str, Timing]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))} | variables
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, "-m", "tests.benchmarks.training_loop", size]
        done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    finally:
        if load is not None:
            load.kill()
            load.wait()
    return {name: Timing(tuple(rounds)) for name, rounds in json.loads(done.stdout).items()}


SECTIONS = (adamw_in_a_loop,)

if __name__ == "__main__":
    print(json.dumps({name: timing.rounds for name, timing in measure(*SIZES[sys.argv[1]]).items()}))
