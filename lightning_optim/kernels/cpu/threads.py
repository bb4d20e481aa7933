"""Threads that run compiled loops over blocks, as many as torch uses.

Kernels release the GIL and run on Python threads rather than in numba's thread pool. Which pool numba finds depends on
the machine; one aborts if two Python threads enter it, another aborts after the process has forked (as data loaders
do), and parallel loops take several times as long to compile.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_blocks(kernel: Callable[..., None], blocks: int, *arguments: Any) -> None:
    """Call ``kernel(first, last, *arguments)`` on ranges that make up ``range(blocks)``, on torch's number of threads.

    There are a few ranges per thread, distributed as threads become free, because other processes of a training run
    use the cores as well.
    """
    threads = min(torch.get_num_threads(), blocks)
    if threads <= 1:
        kernel(0, blocks, *arguments)
        return
    run = max(1, blocks // (threads * 8))
    starts = itertools.count(0, run)  # `next` of a count is atomic.

    def work() -> None:
        while (first := next(starts)) < blocks:
            kernel(first, min(first + run, blocks), *arguments)

    others: list[Future[None]] = [_executor(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="lightning_optim"), size
    return _pool


def _forget() -> None:
    global _pool
    _pool = None  # Threads do not survive a fork.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
