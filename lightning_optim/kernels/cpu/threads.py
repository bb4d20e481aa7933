"""Threads that run kernels: torch's own where they are found, else a pool of Python threads.

Neither is numba's thread pool: which one numba finds depends on the machine; one aborts if two Python threads enter it,
another aborts after the process has forked (as data loaders do), and parallel loops take several times as long to
compile.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_optim.kernels.cpu import openmp
from lightning_optim.kernels.cpu.launch import BLOCKS, DONE, RUN, TABLES, BlockLoop

ALONE = 32768
"""Number of elements up to which one thread is faster than to wake others; torch's own operations have the same."""

RUNS_PER_THREAD = 8
"""Number of runs per thread into which the blocks are divided at least, as other processes use the cores as well."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run_blocks(kernel: BlockLoop, blocks: int, elements: int, *tables: npt.NDArray[Any]) -> None:
    """Run ``kernel`` over ``range(blocks)`` on torch's number of threads.

    Args:
        kernel: The compiled kernel.
        blocks: Number of blocks.
        elements: Number of elements in all blocks, by which it is decided whether threads are worth waking.
        tables: Arrays that the kernel reads and writes, C-contiguous, two dimensions each.

    Raises:
        MemoryError: A kernel could not allocate its buffers.
    """
    threads = 1 if blocks <= 1 or elements <= ALONE else torch.get_num_threads()
    team = openmp.team() if threads > 1 else None
    if team is not None and not team.is_free():
        threads = 1
    record = np.zeros(TABLES + 3 * len(tables), dtype=np.int64)
    record[BLOCKS] = blocks
    record[RUN] = max(1, blocks // (threads * RUNS_PER_THREAD))
    record[TABLES:] = [value for table in tables for value in (table.__array_interface__["data"][0], *table.shape)]
    address = record.__array_interface__["data"][0]  # `record.ctypes` takes several times as long
    if threads <= 1:
        kernel.dispatcher(address)
    elif team is not None:
        # The team gets torch's number of threads even for fewer blocks: a smaller one would end some of its threads,
        # and torch's next operation would have to start them again.
        team.run(kernel.address, address, threads)
    else:
        pool = _executor(threads - 1)
        # Each thread holds the arrays whose addresses it has, as an error here or Ctrl+C would free them too early.
        jobs = [pool.submit(_run, kernel, record, tables) for _ in range(min(threads, blocks) - 1)]
        kernel.dispatcher(address)
        for job in jobs:
            job.result()
    if record[DONE] != blocks:
        raise MemoryError(
            f"Only {record[DONE]} of {blocks} blocks of a step were computed, because a thread could not allocate its "
            "buffers. Parameters and states are updated in part: load a checkpoint."
        )


def _run(kernel: BlockLoop, record: npt.NDArray[np.int64], tables: tuple[npt.NDArray[Any], ...]) -> None:
    kernel.dispatcher(record.ctypes.data)


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
