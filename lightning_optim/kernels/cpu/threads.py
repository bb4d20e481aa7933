"""Runs compiled loops over blocks on as many threads as torch uses.

Threads of our own around kernels that release the GIL, rather than numba's pool: which pool numba finds depends on the
machine, one of them aborts when two Python threads meet in it and another when the process has forked (as data loaders
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
    """Call ``kernel(first, last, *arguments)`` on runs that make up ``range(blocks)``, on torch's number of threads.

    Runs are a few per thread, handed out as threads become free: the cores of a training machine are seldom idle.
    """
    threads = min(torch.get_num_threads(), blocks)
    if threads <= 1:
        kernel(0, blocks, *arguments)
        return
    run = max(1, blocks // (threads * 8))
    starts = itertools.count(0, run)  # `next` on it is atomic

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
    _pool = None  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
