"""Ranks that end. Run by test_ranks.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch.distributed as dist


def end_by_a_signal(before: Path, times: int) -> int:
    """The last rank is killed so many times, once in each of its lives."""
    if dist.get_rank() == dist.get_world_size() - 1 and len(lives := list(before.iterdir())) < times:
        (before / str(len(lives))).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def end_by_itself() -> None:
    """The first rank ends in the middle of its work."""
    if dist.get_rank() == 0:
        os._exit(3)
