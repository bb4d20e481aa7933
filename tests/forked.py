"""Processes that start within milliseconds, because what they fork from has imported torch and Lightning already.

That one is the standard library's fork server: a process of its own which has done nothing but import, so it has no
threads that a fork could lose, and knows nothing of what the test run has done before.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

_PRELOAD = ["lightning_optim.callbacks", "lightning_optim.kernels.cpu.backend", "tests.helpers"]


def context() -> ForkServerContext:
    """The fork server, with what it has to import."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the server takes its path from nowhere else
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOAD)
    return server


def start(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Run ``function`` of an importable module in a process of its own, which ends when it returns."""
    process = context().Process(target=_run, args=(function, *args))
    process.start()
    return process


def _run(function: Callable[..., None], *args: Any) -> None:
    quiet()
    function(*args)
    end()


def quiet() -> None:
    """No warnings, and one thread."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def end() -> NoReturn:
    """End a process that has done all its work, without the interpreter's usual end.

    With torch 2.13 a process that has used gloo aborts there about one time in fifty ("terminate called without an
    active exception"), with nothing of this package imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
