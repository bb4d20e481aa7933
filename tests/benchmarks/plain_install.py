"""AdamW by its name against torch's fused one, in an environment that has the package's wheel and no extras.

It needs nothing but what the wheel installs, so that it can run there:

    python -m venv /tmp/plain && /tmp/plain/bin/pip install dist/lightning_optim-*.whl
    /tmp/plain/bin/python tests/benchmarks/plain_install.py

It prints what the first use and a step cost, and exits with 1 if a step takes more than 1.2 times torch's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

import lightning_optim as lo

LIMIT = 1.2


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def model() -> nn.Module:
    """Twelve layers' worth of matrices and vectors, 21 million parameters with gradients."""
    torch.manual_seed(0)
    made = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(384, 4 * 384), nn.Linear(4 * 384, 768))])
    for param in made.parameters():
        param.grad = torch.randn_like(param)
    return made


def main() -> None:
    extras = [name for name in ("jsonargparse", "rich", "matplotlib") if find_spec(name)]
    ours, _ = lo.OptimizerFactory("adamw", lr=1e-3).build(model())
    torchs = torch.optim.AdamW(model().parameters(), lr=1e-3, fused=True)
    first = seconds(ours.step)
    ratios, times = [], []
    for round_ in range(35):
        mine, theirs = seconds(ours.step), seconds(torchs.step)
        if round_ >= 5:
            ratios.append(mine / theirs)
            times.append((mine, theirs))
    ratio = statistics.median(ratios)
    mine, theirs = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, extras: {', '.join(extras) or 'none'}\n"
        f"first step {first:.2f} s, with the import of numba, and compilation where the cache on disk has no kernel\n"
        f"step {mine:.2f} ms, torch's fused AdamW {theirs:.2f} ms, ratio {ratio:.2f} (limit {LIMIT})"
    )
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
