"""Runs a script in several processes that form one gloo group, for tests of what ranks do together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]

_AROUND = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tests import ranks
rank = ranks.join()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
{script}
ranks.leave()
"""


def join() -> int:
    """Enters the group that `run_ranks` has prepared, and returns the rank."""
    _, rank, world_size, store = sys.argv
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=int(rank), world_size=int(world_size), store=dist.FileStore(store, int(world_size))
    )
    return int(rank)


def leave() -> NoReturn:
    """Ends a rank that has done all its work.

    Without the interpreter's usual end: with torch 2.13 a process that has used gloo aborts there about one time in
    fifty ("terminate called without an active exception"), with nothing of this package imported.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(script: str, folder: Path, world_size: int = 2, timeout: float = 200) -> list[str]:
    """Runs `script` on every rank, where `rank`, `mesh`, `torch` and `dist` are defined; returns what each printed.

    Raises:
        AssertionError: a rank failed; the message has what the ranks wrote to standard error.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _AROUND.format(script=script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        printed = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in printed)
    return [output for output, _ in printed]
