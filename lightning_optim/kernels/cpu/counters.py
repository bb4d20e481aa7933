"""The 0-d state of many tensors, read and written by compiled loops over their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu.memory import load, store

_TEXT = """\
def kernel(launch):
    addresses, values, count, writes = word(launch, 0), word(launch, 1), word(launch, 2), word(launch, 3)
    for i in range(count):
        if writes:
            store_number(word(addresses, i), 0, number(load_value(values, i)))
        else:
            store_value(values, i, double(load_number(word(addresses, i), 0)))
"""


class CompiledNumbers:
    """The values of 0-d tensors of one dtype.

    Args:
        tensors: 0-d tensors, all float32 or all float64, which keep their memory.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)
        self._values = np.empty(len(tensors))
        places = self._addresses.ctypes.data, self._values.ctypes.data
        self._record = np.array([*places, len(tensors), 0], dtype=np.int64)
        self._record_at = self._record.ctypes.data
        name = str(tensors[0].dtype).removeprefix("torch.")
        self._loop = _build(name)

    def read(self) -> npt.NDArray[np.float64]:
        """Return the values, shape [tensors], in an array that the next call overwrites."""
        self._record[3] = 0
        self._loop.dispatcher(self._record_at)
        return self._values

    def write(self, values: npt.NDArray[np.float64]) -> None:
        """Write new values, shape [tensors], rounded to the dtype of the tensors."""
        self._values[:] = values
        self._record[3] = 1
        self._loop.dispatcher(self._record_at)


@cache
def _build(dtype: str) -> launch.BlockLoop:
    """Compile the loop that reads or writes 0-d tensors of ``dtype``."""
    names: dict[str, Any] = launch.names({}) | {
        "__name__": __name__,
        "load_number": load(dtype, 0, 2),
        "store_number": store(dtype, 0, 2, False),
        "load_value": load("float64", 1, 2),
        "store_value": store("float64", 1, 2, False),
        "double": numba.float64,
        "number": getattr(numba, dtype),
    }
    kept_as = f"counters-{disk_cache.fingerprint(_TEXT + dtype, ())}"
    return launch.compile_loop(f"of {dtype} counters", _TEXT, names, kept_as)
