"""What compiled backends share: tensors as addresses, blocks over all of them, and the passes of one step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.sharding import sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.base import Backend, Batch, arithmetic_dtype
from lightning_optim.kernels.plain import is_dense
from lightning_optim.kernels.reference import whole_numel
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.kernels.scalars import commit, scalar_columns
from lightning_optim.kernels.weight_decay import decay_factor, norm_factor

DTYPES = {getattr(torch, name): name for name in ("float32", "float64", "bfloat16", "float16", "uint8")}
"""What can be loaded and stored, with the name kernels are built by."""


@dataclass(frozen=True)
class Operands:
    """Tensors as a kernel sees them: each row is a tensor, each slot one of its arrays, all of one number of elements.

    Args:
        device: Where they are.
        dtypes: Name of each slot's dtype: parameter, gradient, states; only the gradient for a measurement.
        numel: Elements of each tensor.
        addresses: Of the first elements, [tensors, slots].
        decay_form: As in the batch.
        kahan: As in the batch; the compensation is the slot after the states. Then come initial weights, for `pull`.
        stochastic: As in the batch; the scalars then have the `rounding.KEY_COLUMNS`.
        quantized: As in the batch; their scales are the last slots.
    """

    device: torch.device
    dtypes: tuple[str, ...]
    numel: tuple[int, ...]
    addresses: npt.NDArray[np.int64]
    decay_form: str = "shrink"
    kahan: bool = False
    stochastic: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic runs in."""
        return arithmetic_dtype(getattr(torch, self.dtypes[0]))


class CompiledBackend(Backend):
    """Runs elementwise rules by kernels over addresses; a subclass says how one kernel is built and launched."""

    @abstractmethod
    def run(
        self,
        operands: Operands,
        rule: type[UpdateRule],
        purpose: str,
        cautious: bool,
        columns: Mapping[str, Tensor],
        skip: Tensor | None,
    ) -> tuple[tuple[str, ...], Tensor]:
        """One pass over the operands.

        Args:
            operands: What to read and write.
            rule: Whose arithmetic to run.
            purpose: `step` updates; `step+sums` also collects the step sums. The others write nothing: `sums` takes the
                rule's own sums, `agreement` counts the elements whose update agrees with the gradient, `moved_sq` takes
                the square sum of parameters after the update.
            cautious: For the `step`s and `moved_sq`: apply the mask and the column `mask_scale`.
            columns: Scalars by name, each [tensors], float64.
            skip: Non-zero: write nothing; the sums are then undefined.

        Returns:
            Names of the sums, and the sums, [tensors, names], float64.
        """

    @abstractmethod
    def run_measure(self, operands: Operands) -> Tensor:
        """Square sums of the operands' only slot, [tensors], float64."""

    def supports(self, batch: Batch) -> bool:
        """Elementwise rules, and dtypes that kernels have loads and stores for."""
        return isinstance(batch.rule, UpdateRule) and all(c[0].dtype in DTYPES for c in slots(batch))

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """See `Backend`."""
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
        dtype = grads[0].dtype
        addresses = np.array(list(map(Tensor.data_ptr, grads)), dtype=np.int64)[:, None]
        operands = Operands(grads[0].device, (DTYPES[dtype],), tuple(map(Tensor.numel, grads)), addresses)
        return self.run_measure(operands)

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """See `Backend`."""
        rule = batch.rule
        assert isinstance(rule, UpdateRule)
        columns = scalar_columns(batch, divisor)
        with operands_of(batch) as operands:
            names, sums = self.run(operands, type(rule), "sums", False, columns, None)
        return named_sums(batch, names, sums)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """See `Backend`."""
        rule = batch.rule
        assert isinstance(rule, UpdateRule)
        columns = scalar_columns(batch, divisor)
        with operands_of(batch) as operands:

            def run(purpose: str, cautious: bool = False) -> dict[str, Tensor]:
                names, sums = self.run(operands, type(rule), purpose, cautious, columns, skip)
                return named_sums(batch, names, sums)

            if rule.sums and not rule.shared:
                columns |= rule.rescale(columns, run("sums"), whole_numel(batch))
            if batch.cautious:
                counts = run("agreement")["agreement"]
                whole = whole_numel(batch)
                columns["mask_scale"] = whole / counts.maximum(whole * 1e-3)
            if batch.decay_form == "rescale":
                moved_sq = run("moved_sq", batch.cautious)["moved_sq"]
                columns["decay"] = norm_factor(columns["decay"], moved_sq, whole_numel(batch))
            sums = run("step+sums" if collect else "step", batch.cautious)
        commit(batch, columns, skip)
        if not collect:
            return None
        if rule.decays_beside:
            decaying = sums.get("decay_sq", sums["param_sq"])
            sums["decay_sq"] = decaying * decay_factor(batch.decay_form, columns["decay"]).square()
        missing = torch.full((len(batch.params),), math.nan, dtype=torch.float64, device=batch.device)
        result = torch.stack([sums.get(name, missing) for name in STEP_SUMS], dim=1).float()
        return result if skip is None else result.masked_fill(skip != 0, math.nan)


def named_sums(batch: Batch, names: Sequence[str], sums: Tensor) -> dict[str, Tensor]:
    """A kernel's sums by name, over all shards, each [tensors]."""
    return dict(zip(names, sum_over_shards(sums, batch.wholes).unbind(1), strict=True)) if names else {}


@contextmanager
def operands_of(batch: Batch) -> Iterator[Operands]:
    """The batch as operands; what had to be copied for it is written back at the end."""
    addresses, write_back, keep = find(batch)
    yield Operands(
        batch.device,
        tuple(DTYPES[column[0].dtype] for column in slots(batch)),
        batch.numel,
        addresses,
        batch.decay_form,
        batch.kahan,
        batch.stochastic,
        batch.quantized,
    )
    for tensor, copy in write_back:
        tensor.copy_(copy)
    del keep


def slots(batch: Batch) -> list[list[Tensor]]:
    """Parameters, gradients and states, each a list over tensors, in the order of a kernel's slots."""
    return [batch.params, batch.grads, *batch.arrays]


def find(batch: Batch) -> tuple[npt.NDArray[np.int64], list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Addresses [tensors, slots]; copies to be written back; and all copies, to be kept alive meanwhile.

    Elements of one index must lie at one offset. Where strides differ, or leave gaps, the odd one is copied to a
    contiguous tensor first. Random numbers follow the row-major index, so they need contiguous tensors in any case.
    """
    if batch.addresses is not None and all(map(Tensor.is_contiguous, batch.grads)):
        addresses = batch.addresses.copy()
        addresses[:, 1] = list(map(Tensor.data_ptr, batch.grads))
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
    """Blocks of up to ``size`` elements, [blocks, 3]: tensor, first element, end."""
    sizes = np.array(numel, dtype=np.int64)
    counts = -(-sizes // size)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return np.ascontiguousarray(np.stack([tensor, first, np.minimum(first + size, sizes[tensor])], axis=1))


def scalar_names(rule: type[UpdateRule], purpose: str, cautious: bool) -> tuple[str, ...]:
    """The columns that a kernel needs, each once."""
    own = rule.sums_scalars() if purpose == "sums" else rule.update_scalars()
    columns = ["inverse_divisor", "l2", *own]
    if purpose.startswith("step"):
        columns.append("decay")
    if purpose == "step+sums":
        columns += ["eps", "bias_correction2_sqrt"]
    if cautious:
        columns.append("mask_scale")
    return tuple(dict.fromkeys(columns))


def scalar_table(columns: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Columns side by side, [tensors, names]."""
    return torch.stack([columns[name] for name in names], dim=1).to(dtype)
