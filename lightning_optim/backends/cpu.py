"""The CPU backend: numba loops over blocks of all tensors at once, on torch's number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from lightning_optim.backends.reference import apply_tensor_rule, whole_numel
from lightning_optim.backends.scalars import commit, is_set, scalar_columns
from lightning_optim.backends.shards import sum_over_shards
from lightning_optim.rules import TensorRule, UpdateRule
from lightning_optim.stats import STEP_SUMS

BLOCK = 65536
"""Elements per block: 256 KB of float32, so that a block's few arrays stream while threads stay evenly loaded."""

SUBTRACTED_AT_ONCE = 2**20
"""Elements of a tensor rule's updates that are subtracted in one pass."""

DTYPES = {getattr(torch, name): name for name in STORAGE}


class CpuBackend(Backend):
    """One pass over memory for elementwise rules: divide, update, write and sum."""

    name = "cpu"

    def why_not(self, device: torch.device) -> str | None:
        """It runs on the CPU only."""
        return None if device.type == "cpu" else "it updates tensors in the CPU's memory only."

    def supports(self, batch: Batch) -> bool:
        """Tensor rules; and elementwise ones in the dtypes it has loads and stores for."""
        return isinstance(batch.rule, TensorRule) or all(t.dtype in DTYPES for t in _tensors(batch, 0))

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """See `Backend`."""
        dense = [grad if _dense(grad) else grad.contiguous() for grad in grads]
        kernel = build_measure(DTYPES[grads[0].dtype])
        addresses = np.array([[grad.data_ptr()] for grad in dense], dtype=np.int64)
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        numel = tuple(grad.numel() for grad in dense)
        return _run(kernel, numel, addresses, np.zeros((1, 1), _numpy(wide)))[:, 0].to(wide)

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """See `Backend`."""
        return _Pass(batch, scalar_columns(batch, divisor)).run("sums")

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """See `Backend`."""
        if isinstance(batch.rule, TensorRule):
            subtract = _subtract if batch.params[0].dtype in DTYPES else None
            update = batch.rule.update_on_cpu
            return apply_tensor_rule(batch, update, subtract, divisor=divisor, skip=skip, collect=collect)
        if is_set(skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan) if collect else None
        rule = batch.rule
        assert isinstance(rule, UpdateRule)
        columns = scalar_columns(batch, divisor)
        passes = _Pass(batch, columns)
        if rule.sums and not rule.shared:
            columns |= rule.rescale(columns, passes.run("sums"), whole_numel(batch))
        if batch.cautious:
            counts = passes.run("agreement")["agreement"]
            whole = whole_numel(batch)
            columns["mask_scale"] = whole / counts.maximum(whole * 1e-3)
        sums = passes.run("step+sums" if collect else "step", batch.cautious)
        passes.write_back()
        commit(batch, columns, skip)
        if not collect:
            return None
        missing = torch.full((len(batch.params),), math.nan, dtype=torch.float64)
        return torch.stack([sums.get(name, missing) for name in STEP_SUMS], dim=1).float()


class _Pass:
    """Passes over the tensors of one batch; ``columns`` may change from one to the next."""

    def __init__(self, batch: Batch, columns: dict[str, Tensor]) -> None:
        self._batch = batch
        self._columns = columns
        self._dtypes = tuple(DTYPES[tensor.dtype] for tensor in _tensors(batch, 0))
        self._numel = tuple(param.numel() for param in batch.params)
        self._addresses, self._copied, self._keep = _addresses(batch)

    def run(self, purpose: str, cautious: bool = False) -> dict[str, Tensor]:
        """Run the kernel for ``purpose`` (see `cpu_kernels.build`); its sums by name, each [tensors], float64."""
        kernel = build(type(self._batch.rule), self._dtypes, purpose, cautious)  # type: ignore[arg-type] # not Hashable
        table = torch.stack([self._columns[name] for name in kernel.scalars], dim=1).to(self._batch.dtype)
        sums = sum_over_shards(_run(kernel, self._numel, self._addresses, table.numpy()), self._batch.wholes)
        return dict(zip(kernel.sums, sums.unbind(1), strict=True))

    def write_back(self) -> None:
        """Bring what was updated in a copy to where it belongs."""
        for tensor, copy in self._copied:
            tensor.copy_(copy)


class _Subtraction(UpdateRule):
    """What is given for the gradient is what is subtracted."""

    @staticmethod
    def update(param: Any, grad: Any) -> Any:
        """One element's step."""
        return (grad,)


def _subtract(batch: Batch, deltas: Iterable[Tensor], decay: Tensor) -> None:
    """Subtract ``deltas``, and the decay ([tensors]), from the parameters of ``batch`` in one pass.

    Some tensors at a time: deltas that are made only when they are taken then stay in the cache.
    """
    some: list[Tensor] = []
    first = 0
    for i, delta in enumerate(deltas):
        some.append(delta)
        if sum(map(Tensor.numel, some)) < SUBTRACTED_AT_ONCE and i + 1 < len(batch.params):
            continue
        part = slice(first, i + 1)
        nothing: list[dict[str, Tensor]] = [{} for _ in some]
        only = Batch(_Subtraction(), batch.params[part], some, nothing, nothing, [], batch.wholes[part], False)
        c = decay[part]
        passes = _Pass(only, {"inverse_divisor": torch.ones_like(c), "l2": torch.zeros_like(c), "decay": c})
        passes.run("step")
        passes.write_back()
        some, first = [], i + 1


def _tensors(batch: Batch, i: int) -> list[Tensor]:
    """Parameter, gradient and states of tensor ``i``, in the order of the kernel's slots."""
    state = batch.states[i]
    return [batch.params[i], batch.grads[i], *(state[name] for name in batch.rule.state)]


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
    contiguous tensor first.
    """
    rows = []
    write_back: list[tuple[Tensor, Tensor]] = []
    keep: list[Tensor] = []
    for i in range(len(batch.params)):
        tensors = _tensors(batch, i)
        if not all(map(Tensor.is_contiguous, tensors)):
            strides = tensors[0].stride()
            if not (_dense(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)):
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
