"""The OpenMP threads of torch, which wait for work between its operations.

torch runs its operations on a team of OpenMP threads, which spin for a while after each one. Threads of our own would
compete with them for the cores, so kernels run on that team: by ``GOMP_parallel``, the entry which GCC's compiled code
calls, and which LLVM's and Intel's libraries offer as well. Which of the OpenMP libraries of a process is torch's, the
dynamic linker knows: it looked for symbols first in what is loaded for everybody (``LD_PRELOAD`` included), then
in the dependencies of torch's own library, and so does this module.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch

_forked = False


class Team:
    """Entry into torch's OpenMP library.

    Args:
        library: Handle by which its functions are found.

    Raises:
        AttributeError: A function is not found.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._in_parallel = ctypes.CFUNCTYPE(ctypes.c_int)(_address(library, "omp_in_parallel"))
        entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self.entry = _address(library, "GOMP_parallel")
        self._parallel = entry(self.entry)

    def run(self, function: int, argument: int, threads: int) -> None:
        """Call a C function of one pointer on each of up to ``threads`` threads, this one included, without the GIL.

        Args:
            function: Address of ``void (*)(void *)``.
            argument: Its argument.
            threads: Number of threads.
        """
        self._parallel(function, argument, threads, 0)

    def is_free(self) -> bool:
        """Return whether this thread is outside of parallel regions; inside, a team of its own would help nobody."""
        return not self._in_parallel()


def team() -> Team | None:
    """Return torch's team; None if it was not found, or in a forked process, in which the team's threads do not exist.

    OpenMP libraries do not notice a fork, and would wait forever for the threads of the parent.
    """
    return None if _forked else _find()


@cache
def _find() -> Team | None:
    if os.name != "posix" or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    path = Path(torch.__file__).parent / "lib" / name
    for known in (None, str(path)):
        try:
            return Team(ctypes.CDLL(known, mode=os.RTLD_NOLOAD | os.RTLD_LAZY) if known else ctypes.CDLL(None))
        except (OSError, AttributeError):  # not loaded under this name, or it lacks a function
            continue
    return None


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
