"""Parts shared by the compiled backends: tensors as addresses, blocks over all of them, the passes of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.sharding import sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.base import Batch, arithmetic_dtype
from lightning_optim.kernels.batch_values import whole_numel
from lightning_optim.kernels.kernel_spec import KernelSpec
from lightning_optim.kernels.plain import is_dense
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.kernels.scalars import commit
from lightning_optim.kernels.sizes import Sizes
from lightning_optim.kernels.weight_decay import decay_factor, norm_factor

DTYPES = {getattr(torch, name): name for name in ("float32", "float64", "bfloat16", "float16", "uint8", "int8")}
"""Dtypes that kernels can load and store, with the name by which kernels are generated."""


@dataclass(frozen=True)
class KernelArgs:
    """Tensors as a kernel sees them: each row is a tensor, and each slot is one of its arrays, of equal sizes.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the arithmetic.
        sizes: Number of elements of each tensor.
        addresses: Addresses of the first elements, int64, [tensors, slots].
        row_sizes: Size of the rows of each tensor that blocks of 8-bit codes must not cross; None without such codes.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    addresses: npt.NDArray[np.int64]
    row_sizes: tuple[int, ...] | None = None

    @property
    def numel(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return self.sizes.numel


Run = Callable[[KernelSpec, KernelArgs, Mapping[str, Tensor], Tensor | None], tuple[tuple[str, ...], Tensor]]
"""A backend's function that builds and launches one kernel. Its arguments are the specification of the kernel, the
tensors it reads and writes, its scalars by name, [tensors] each, float64, and a flag, [], which if non-zero prevents
all writes. It returns the names of the kernel's sums and the sums, [tensors, names], float64, undefined if the flag is
set."""


Scalars = Callable[[Batch, Tensor | None, Tensor | None, bool], dict[str, Tensor]]
"""A backend's function that computes the scalars of a batch, as `scalars.scalar_columns` does. Its arguments are the
batch, the divisor and the flag as for `Backend.apply`, and whether the scalars are needed one by one, and not only in
the table of one kernel."""


class ElementwiseSteps:
    """The passes of one step of an elementwise rule, each of which is one kernel.

    Args:
        run: Function of the backend that runs a kernel.
        scalars: Function of the backend that computes scalars.
    """

    def __init__(self, run: Run, scalars: Scalars) -> None:
        self._run, self._scalars = run, scalars

    def supports(self, batch: Batch) -> bool:
        """Return whether the rule is elementwise and kernels can load and store all dtypes."""
        if not isinstance(batch.rule, UpdateRule) or (batch.quantized and batch.row_sizes is None):
            return False
        return all(map(DTYPES.__contains__, batch.slot_dtypes))

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Implement `Backend`."""
        columns = self._scalars(batch, divisor, None, True)
        with kernel_args(batch) as args:
            return self.run(batch, args, "sums", False, columns, None)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`."""
        rule = batch.rule
        assert isinstance(rule, UpdateRule)
        has_more = bool(rule.sums) or batch.cautious or batch.decay_form == "rescale"
        columns = self._scalars(batch, divisor, skip, has_more)
        with kernel_args(batch) as args:
            if rule.sums and not rule.shared:
                sums = self.run(batch, args, "sums", False, columns, skip)
                columns |= rule.rescale(columns, sums, whole_numel(batch))
            if batch.cautious:
                counts = self.run(batch, args, "agreement", False, columns, skip)["agreement"]
                whole = whole_numel(batch)
                columns["mask_scale"] = whole / counts.maximum(whole * 1e-3)
            if batch.decay_form == "rescale":
                moved_sq = self.run(batch, args, "moved_sq", batch.cautious, columns, skip)["moved_sq"]
                columns["decay"] = norm_factor(columns["decay"], moved_sq, whole_numel(batch))
            sums = self.run(batch, args, "step+sums" if collect else "step", batch.cautious, columns, skip)
        if not getattr(columns, "has_advanced", False):
            commit(batch, columns, skip)
        if not collect:
            return None
        if rule.decays_beside:
            decaying = sums.get("decay_sq", sums["param_sq"])
            sums["decay_sq"] = decaying * decay_factor(batch.decay_form, columns["decay"]).square()
        missing = torch.full((len(batch.params),), math.nan, dtype=torch.float64, device=batch.device)
        result = torch.stack([sums.get(name, missing) for name in STEP_SUMS], dim=1).float()
        return result if skip is None else result.masked_fill(skip != 0, math.nan)

    def run(
        self,
        batch: Batch,
        args: KernelArgs,
        purpose: str,
        cautious: bool,
        columns: Mapping[str, Tensor],
        skip: Tensor | None,
    ) -> dict[str, Tensor]:
        """Run one pass over the batch.

        Args:
            batch: The batch.
            args: The tensors of the batch as arguments of a kernel.
            purpose: As in `KernelSpec`.
            cautious: As in `KernelSpec`.
            columns: Scalars by name, [tensors] each, float64.
            skip: Flag, shape []; if non-zero, nothing is written. None to never skip.

        Returns:
            The kernel's sums by name, over all shards, [tensors] each, float64; undefined if ``skip`` is set.
        """
        spec = batch.kernels.get((purpose, cautious))
        if spec is None:
            dtypes = tuple(map(DTYPES.__getitem__, batch.slot_dtypes))
            storing = (batch.decay_form, batch.kahan, batch.stochastic, batch.quantized, batch.averages)
            spec = KernelSpec(type(batch.rule), dtypes, purpose, cautious, *storing)  # type: ignore[arg-type] # asserted
            batch.kernels[purpose, cautious] = spec
        names, sums = self._run(spec, args, columns, skip)
        return dict(zip(names, sum_over_shards(sums, batch.full_params).unbind(1), strict=True)) if names else {}


def measure_args(grads: Sequence[Tensor]) -> tuple[KernelArgs, list[Tensor]]:
    """Return gradients of one dtype and device as arguments of a kernel with one slot, and tensors to keep alive."""
    kept = list(grads)
    if not all(map(Tensor.is_contiguous, kept)):
        kept = [grad if is_dense(grad) else grad.contiguous() for grad in kept]
    addresses = np.array(list(map(Tensor.data_ptr, kept)), dtype=np.int64)[:, None]
    dtype = arithmetic_dtype(kept[0].dtype)
    return KernelArgs(kept[0].device, dtype, Sizes(tuple(map(Tensor.numel, kept))), addresses), kept


@contextmanager
def kernel_args(batch: Batch) -> Iterator[KernelArgs]:
    """Yield the batch as arguments of a kernel; temporary copies are written back when the block ends."""
    addresses, write_back, keep = find(batch)
    row_sizes = batch.row_sizes if batch.quantized else None
    yield KernelArgs(batch.device, batch.dtype, batch.sizes, addresses, row_sizes)
    for tensor, copy in write_back:
        tensor.copy_(copy)
    del keep


def slots(batch: Batch) -> list[list[Tensor]]:
    """Return parameters, gradients and states as lists over tensors, in the order of a kernel's slots."""
    return [batch.params, batch.grads, *batch.state_arrays]


def find(batch: Batch) -> tuple[npt.NDArray[np.int64], list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Find the addresses of all arrays of a batch, and copy arrays to contiguous memory where needed.

    Elements of one index must lie at one offset. Where the strides of the arrays differ or leave gaps, those that are
    not contiguous are copied to contiguous tensors. Random numbers are indexed in row-major order, so stochastic
    rounding needs contiguous tensors in any case.

    Returns:
        Addresses, int64, [tensors, slots]; pairs (tensor, copy) to be written back; and all copies, to be kept alive
        while the kernel runs.
    """
    given = batch.grad_addresses
    if batch.addresses is not None and (given is not None or all(map(Tensor.is_contiguous, batch.grads))):
        addresses = batch.addresses.copy()
        addresses[:, 1] = list(map(Tensor.data_ptr, batch.grads)) if given is None else given
        return addresses, [], []
    columns = [list(column) for column in slots(batch)]
    write_back: list[tuple[Tensor, Tensor]] = []
    keep: list[Tensor] = []
    for i in range(len(batch.params)):
        tensors = [column[i] for column in columns]
        strides = tensors[0].stride()
        alike = is_dense(tensors[0]) and all(tensor.stride() == strides for tensor in tensors)
        if batch.stochastic or not alike:
            for slot, tensor in enumerate(tensors):
                if not tensor.is_contiguous():
                    columns[slot][i] = copy = tensor.contiguous()
                    keep.append(copy)
                    if slot != 1:
                        write_back.append((tensor, copy))
    addresses = np.array([list(map(Tensor.data_ptr, column)) for column in columns], dtype=np.int64)
    return np.ascontiguousarray(addresses.T), write_back, keep


@lru_cache(maxsize=256)
def split(numel: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    """Split tensors into blocks of up to ``size`` elements: int64, [blocks, 3] of (tensor, first element, end)."""
    sizes = np.array(numel, dtype=np.int64)
    counts = -(-sizes // size)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return np.ascontiguousarray(np.stack([tensor, first, np.minimum(first + size, sizes[tensor])], axis=1))


def split_rows(numel: tuple[int, ...], row_sizes: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    """Split tensors into blocks of whole rows, or rows into several blocks, of up to ``size`` elements.

    Args:
        numel: Number of elements of each tensor.
        row_sizes: Number of elements of its rows.
        size: Number of elements, a multiple of `quantization.BLOCK`.

    Returns:
        Blocks, int64, [blocks, 4] of (tensor, first element, end, size of its rows).
    """
    found = [np.zeros((0, 4), dtype=np.int64)]
    for i, (total, row) in enumerate(zip(numel, row_sizes, strict=True)):
        if not total:
            continue
        if row <= size:
            first = np.arange(0, total, size // row * row, dtype=np.int64)
        else:
            first = (np.arange(0, total, row, dtype=np.int64)[:, None] + np.arange(0, row, size)).reshape(-1)
        end = np.append(first[1:], total)
        found.append(np.stack([np.full_like(first, i), first, end, np.full_like(first, row)], axis=1))
    return np.ascontiguousarray(np.concatenate(found))
