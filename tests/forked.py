"""Processes that start within milliseconds, because what they fork from has imported torch and Lightning already.

That one is the standard library's fork server: a process of its own which has done nothing but import, so it has no
threads that a fork could lose, and knows nothing of what the test run has done before.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

_PRELOAD = ["lightning_optim.callbacks", "lightning_optim.kernels.cpu.backend", "tests.helpers"]


def _context() -> ForkServerContext:
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the server takes its path from nowhere else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Runs ``function`` of an importable module in a process of its own, which ends when it returns."""
    process = _context().Process(target=_run, args=(function, *args))
    process.start()
    return process


def _run(function: Callable[..., None], *args: Any) -> None:
    _quiet()
    function(*args)
    _end()


class Ranks:
    """Processes that form one gloo group for Lightning, and do together what they are told, one thing after another.

    Args:
        world_size: How many.
    """

    def __init__(self, world_size: int = 2) -> None:
        self._world_size = world_size
        self._members: list[tuple[ForkServerProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Calls ``function`` on all ranks; what each returned.

        Raises:
            AssertionError: A rank failed, or there was no answer in time. The next call gets new processes.
        """
        if not self._members:
            self._start()
        answers = []
        try:
            for _, connection in self._members:
                connection.send((function, args))
            for rank, (_, connection) in enumerate(self._members):
                assert connection.poll(timeout), f"rank {rank} gave no answer within {timeout} s"
                answer, error = pickle.loads(connection.recv_bytes())
                assert error is None, f"rank {rank}: {error}"
                answers.append(answer)
        except BaseException:
            self.close()
            raise
        return answers

    def close(self) -> None:
        """Ends the processes."""
        while self._members:
            process, connection = self._members.pop()
            connection.close()
            process.kill()
            process.join()

    def _start(self) -> None:
        context = _context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self._world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self._world_size, port))
            process.start()
            there.close()
            self._members.append((process, here))


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    _quiet()
    # As a launcher leaves it, so that Lightning starts no processes.
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            _end()
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))  # `send` would put each tensor into shared memory


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def _end() -> None:
    """Without the interpreter's usual end; see `tests.distributed.ranks.leave`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
