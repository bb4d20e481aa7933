"""The CPU backend: numba loops over blocks of all tensors at once, on torch's number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.backends.base import Backend, Batch
from lightning_optim.backends.cpu_kernels import Kernel, build, build_measure
from lightning_optim.backends.cpu_memory import STORAGE
from lightning_optim.backends.cpu_threads import run_blocks
from lightning_optim.backends.reference import whole_numel
from lightning_optim.backends.scalars import commit, is_set, scalar_columns
from lightning_optim.backends.shards import sum_over_shards
from lightning_optim.rules import UpdateRule
from lightning_optim.stats import STEP_SUMS

BLOCK = 65536
"""Elements per block: 256 KB of float32, so that a block's few arrays stream while threads stay evenly loaded."""

DTYPES = {getattr(torch, name): name for name in STORAGE}


class CpuBackend(Backend):
    """One pass over memory for elementwise rules: divide, update, write and sum."""

    name = "cpu"
    low_precision = True

    def why_not(self, device: torch.device) -> str | None:
        """It runs on the CPU only."""
        return None if device.type == "cpu" else "it updates tensors in the CPU's memory only."

    def supports(self, batch: Batch) -> bool:
        """Elementwise rules, and the dtypes it has loads and stores for."""
        return isinstance(batch.rule, UpdateRule) and all(t.dtype in DTYPES for t in _tensors(batch, 0))

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """See `Backend`."""
        dense = [grad if _dense(grad) else grad.contiguous() for grad in grads]
        kernel = build_measure(DTYPES[grads[0].dtype])
        addresses = np.array([[grad.data_ptr()] for grad in dense], dtype=np.int64)
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        numel = tuple(grad.numel() for grad in dense)
        return _run(kernel, numel, addresses, np.zeros((1, 1), _numpy(wide)))[:, 0].to(wide)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """See `Backend`."""
        if is_set(skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan) if collect else None
        rule = batch.rule
        assert isinstance(rule, UpdateRule)
        dtypes = tuple(DTYPES[tensor.dtype] for tensor in _tensors(batch, 0))
        numel = tuple(param.numel() for param in batch.params)
        addresses, write_back, keep = _addresses(batch)
        columns = scalar_columns(batch, divisor)

        def run(purpose: str, cautious: bool = False) -> dict[str, Tensor]:
            kernel = build(type(rule), dtypes, purpose, cautious, batch.kahan, batch.stochastic)  # type: ignore[arg-type] # mypy: type not Hashable
            table = torch.stack([columns[name] for name in kernel.scalars], dim=1).to(batch.dtype)
            sums = sum_over_shards(_run(kernel, numel, addresses, table.numpy()), batch.wholes)
            return dict(zip(kernel.sums, sums.unbind(1), strict=True))

        if rule.sums:
            columns |= rule.rescale(columns, run("sums"), whole_numel(batch))
        if batch.cautious:
            counts = run("agreement")["agreement"]
            whole = whole_numel(batch)
            columns["mask_scale"] = whole / counts.maximum(whole * 1e-3)
        sums = run("step+sums" if collect else "step", batch.cautious)
        for tensor, copy in write_back:
            tensor.copy_(copy)
        del keep
        commit(batch, columns, skip)
        if not collect:
            return None
        missing = torch.full((len(numel),), math.nan, dtype=torch.float64)
        return torch.stack([sums.get(name, missing) for name in STEP_SUMS], dim=1).float()


def _tensors(batch: Batch, i: int) -> list[Tensor]:
    """Parameter, gradient and states of tensor ``i``, in the order of the kernel's slots."""
    state = batch.states[i]
    kahan = [state["kahan_comp"]] if batch.kahan else []
    return [batch.params[i], batch.grads[i], *(state[name] for name in batch.rule.state), *kahan]


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    sizes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in sizes:
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _addresses(batch: Batch) -> tuple[npt.NDArray[Any], list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Addresses [tensors, slots]; copies to be written back; and all copies, to be kept alive meanwhile.

    Elements of one index must lie at one offset. Where strides differ, or leave gaps, the odd one is copied to a
    contiguous tensor first. Random numbers follow the row-major index, so they need contiguous tensors in any case.
    """
    rows = []
    write_back: list[tuple[Tensor, Tensor]] = []
    keep: list[Tensor] = []
    for i in range(len(batch.params)):
        tensors = _tensors(batch, i)
        if not all(map(Tensor.is_contiguous, tensors)):
            strides = tensors[0].stride()
            alike = _dense(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)
            if batch.stochastic or not alike:
                copies = [tensor.contiguous() for tensor in tensors]
                keep += copies
                # `contiguous` returns the tensor itself where it is so already.
                pairs = zip(tensors, copies, strict=True)
                write_back += [(t, copy) for slot, (t, copy) in enumerate(pairs) if slot != 1 and copy is not t]
                tensors = copies
        rows.append([tensor.data_ptr() for tensor in tensors])
    return np.array(rows, dtype=np.int64), write_back, keep


@lru_cache(maxsize=256)
def _blocks(numel: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Blocks [blocks, 3]: tensor, first element, end."""
    sizes = np.array(numel, dtype=np.int64)
    counts = -(-sizes // BLOCK)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK
    return np.ascontiguousarray(np.stack([tensor, first, np.minimum(first + BLOCK, sizes[tensor])], axis=1))


def _run(kernel: Kernel, numel: tuple[int, ...], addresses: npt.NDArray[Any], scalars: npt.NDArray[Any]) -> Tensor:
    """Run ``kernel`` over all blocks, and add each tensor's block sums in their order: [tensors, sums], float64."""
    blocks = _blocks(numel)
    sums = np.zeros((len(blocks), len(kernel.sums)))
    run_blocks(lambda first, last: kernel.run(first, last, blocks, addresses, scalars, sums), len(blocks))
    totals = np.zeros((len(numel), len(kernel.sums)))
    if kernel.sums:
        np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)


def _numpy(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32
