"""Ranks: processes that form one gloo group and do together what they are given, one thing after another.

They start within milliseconds (`tests.forked`), run a function of an importable module, and send back what it returns.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch.distributed as dist

from tests import forked


class RankEnded(EOFError):
    """The process of a rank ended while an answer was waited for."""

    def __init__(self, rank: int, exit_code: int | None) -> None:
        super().__init__(f"rank {rank} ended with exit code {exit_code}")
        self.by_signal = exit_code is not None and exit_code < 0


class Ranks:
    """Processes that are kept from one call to the next, because imports take longer than most of what ranks do.

    Args:
        world_size: Number of processes.
        join: Whether they form the process group at once; Lightning's strategies do so themselves.
    """

    def __init__(self, world_size: int = 2, join: bool = False) -> None:
        self._world_size, self._join = world_size, join
        self._members: list[tuple[ForkServerProcess, Connection]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call ``function`` on all ranks; return what each returned.

        Raises:
            AssertionError: A rank failed, or there was no answer in time. The next call gets new processes.
            RankEnded: The process of a rank ended.
        """
        if not self._members:
            self._start()
        answers = []
        try:
            for _, connection in self._members:
                connection.send((function, args))
            for rank, (process, connection) in enumerate(self._members):
                assert connection.poll(timeout), f"rank {rank} gave no answer within {timeout} s"
                try:
                    answer, error = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process.join(10)
                    raise RankEnded(rank, process.exitcode) from None
                assert error is None, f"rank {rank}: {error}"
                answers.append(answer)
        except BaseException:
            self.close()
            raise
        return answers

    def close(self) -> None:
        """End the processes."""
        while self._members:
            process, connection = self._members.pop()
            connection.close()
            process.kill()
            process.join()

    def _start(self) -> None:
        context = forked.context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self._world_size):
            here, there = context.Pipe()
            environment = _environment(rank, self._world_size, port)
            process = context.Process(target=_serve, args=(there, environment, self._join))
            process.start()
            there.close()
            self._members.append((process, here))


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 200) -> list[Any]:
    """Call ``function`` on ranks that have joined a group, and end them; return what each returned.

    A rank that ends by a signal is told of in a warning, and all begin once more. With torch 2.13 and gloo one such end
    was seen in some thousand starts ("double free or corruption" in a process of two; never again in 500 runs of the
    same checks under glibc's checks of its heap, in 280 000 exchanges, or in 1000 starts); another is known of torch
    alone (`tests.forked.end`).

    Raises:
        AssertionError: A rank failed, or there was no answer in time.
        RankEnded: The process of a rank ended, by a signal twice.
    """
    try:
        with Ranks(world_size, join=True) as ranks:
            return ranks.run(function, *args, timeout=timeout)
    except RankEnded as ended:
        if not ended.by_signal:
            raise
        warnings.warn(f"{ended}: what all threads did is on standard error; the ranks start once more", stacklevel=2)
    with Ranks(world_size, join=True) as ranks:
        return ranks.run(function, *args, timeout=timeout)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher leaves, so that Lightning starts no processes and torch finds the group."""
    return {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(connection: Connection, environment: dict[str, str], join: bool) -> None:
    forked.quiet()
    faulthandler.enable()
    for name in list(os.environ):
        if name.startswith(("SLURM", "PL_")):  # of a cluster's job in which the tests run
            del os.environ[name]
    os.environ |= environment
    if join:
        dist.init_process_group("gloo")
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            forked.end()
        answer: tuple[Any, str | None]
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))  # `send` would put each tensor into shared memory
