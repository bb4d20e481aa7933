"""What the first step costs in a fresh process, with and without compiled kernels on disk.

``python -m tests.benchmarks.cold_start`` prints seconds of one processor, from the import of the optimizer to the end
of its first step, the import of torch left out. Ours come in addition to torch's fused AdamW in the same process,
because any optimizer of torch imports ``torch._dynamo``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.timing import machine, table

REPEATS = 3


def first_steps(which: str) -> float:
    """Seconds of this process for the first step of ``which``."""
    import torch

    from tests.benchmarks.models import transformer

    torch.set_num_threads(1)
    params = transformer(layers=2)
    start = time.process_time()
    torch.optim.AdamW(params, fused=True).step()
    if which == "torch":
        return time.process_time() - start
    start = time.process_time()
    import lightning_optim as lo

    optimizer = lo.optim.AdamW(params)
    if which == "everything":
        lo.StepPipeline(
            optimizer,
            clip=lo.clipping.GlobalNorm(),
            detectors=[lo.divergence.NonFiniteGradient()],
            on_report=lambda record: None,
        )
    optimizer.step()
    return time.process_time() - start


def _fresh(which: str, cache: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.cold_start", which],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"NUMBA_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return float(done.stdout)


def cold_start() -> str:
    """One row each for torch's AdamW, for ours, and for ours with clip, skip and sums."""
    rows: list[list[object]] = []
    titles = {"torch": "torch's, fused", "alone": "ours alone", "everything": "ours with clip + skip + sums"}
    for which, title in titles.items():
        empty, kept = [], []
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as cache:
                empty.append(_fresh(which, cache))
                kept.append(_fresh(which, cache))
        rows.append([title, statistics.median(empty), statistics.median(kept)])
    return table(
        ["AdamW, first step in a fresh process, s of one processor", "nothing on disk", "kernels on disk"], rows
    )


SECTIONS = (cold_start,)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(first_steps(sys.argv[1]))
    else:
        print(machine(), flush=True)
        print()
        print(cold_start(), flush=True)
