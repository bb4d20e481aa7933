"""The CPU backend: numba loops over blocks of all tensors at once, on as many threads as torch uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.host import is_set
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels import shared_work
from lightning_optim.kernels.averages import weight_names
from lightning_optim.kernels.base import Backend, Batch, arithmetic_dtype
from lightning_optim.kernels.compiled import (
    DTYPES,
    ElementwiseSteps,
    KernelArgs,
    kernel_args,
    measure_args,
    split,
    split_rows,
)
from lightning_optim.kernels.cpu.codegen import build, build_measure, build_subtraction
from lightning_optim.kernels.cpu.counters import CompiledNumbers
from lightning_optim.kernels.cpu.factored import Scaled
from lightning_optim.kernels.cpu.objects import Watch
from lightning_optim.kernels.cpu.threads import run_blocks
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.matrix_rule import MatrixRule
from lightning_optim.kernels.reference import apply_tensor_rule, begin_alone
from lightning_optim.kernels.rules import Rule, TensorRule
from lightning_optim.kernels.scalars import HostColumns, host_scalars
from lightning_optim.kernels.sizes import Sizes

BLOCK = 65536
"""Elements per block, 256 KB of float32: long enough to stream memory, short enough to balance the threads."""

SUBTRACTED_AT_ONCE = 2**20
"""Number of elements of a tensor rule's updates that are subtracted in one pass."""


_NOTHING = np.zeros((0, 0))


class CpuBackend(Backend):
    """Backend with one pass over memory for elementwise rules, which divides, updates, writes and sums."""

    name = "cpu"
    low_precision = True
    takes_addresses = True
    watch = Watch
    numbers = CompiledNumbers

    def __init__(self) -> None:
        self._elementwise = ElementwiseSteps(run, _scalars)

    def why_not(self, device: torch.device) -> str | None:
        """Implement `Backend`: it runs on the CPU only."""
        return None if device.type == "cpu" else "it updates tensors in the CPU's memory only."

    def supports(self, batch: Batch) -> bool:
        """Implement `Backend`: it runs tensor rules, and elementwise rules over dtypes that kernels support."""
        return isinstance(batch.rule, TensorRule) or self._elementwise.supports(batch)

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Implement `Backend`."""
        args, kept = measure_args(grads)
        return _measure(args, kept[0].dtype)

    def measure_at(
        self, addresses: npt.NDArray[np.int64], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Implement `Backend`."""
        return _measure(KernelArgs(device, arithmetic_dtype(dtype), sizes, addresses[:, None]), dtype)

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Implement `Backend`."""
        return self._elementwise.sums(batch, divisor)

    def begin(
        self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool
    ) -> Callable[[], Tensor | None]:
        """Implement `Backend`."""
        start = shared_work.begin if shared_work.shares_now(batch) else begin_alone
        return start(batch, **self._of_tensor_rule(batch), divisor=divisor, skip=skip, collect=collect)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`; the host reads the flag ``skip``, which costs nothing here, so kernels need not."""
        if batch.route is not None:
            return self.begin(batch, divisor=divisor, skip=skip, collect=collect)()
        if isinstance(batch.rule, TensorRule):
            return apply_tensor_rule(batch, **self._of_tensor_rule(batch), divisor=divisor, skip=skip, collect=collect)
        if skip is not None and is_set(skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        return self._elementwise.apply(batch, divisor=divisor, skip=None, collect=collect)

    def _of_tensor_rule(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments by which the update of a tensor rule uses this backend's kernels."""
        rule = batch.rule
        assert isinstance(rule, TensorRule)
        subtract = self._subtract if batch.params[0].dtype in DTYPES else None
        # Kernels compute the rule of the class that has them, of which a subclass may change any part.
        own = vars(type(rule))
        if isinstance(rule, MatrixRule) and "on_cpu" in own:
            return {"update": rule.update, "subtract": subtract, "in_place": rule.on_cpu}
        if "update_on_cpu" in own:
            return {"update": rule.update_on_cpu, "subtract": subtract, "divides": rule.divides_on_cpu}
        return {"update": rule.update, "subtract": subtract}

    def _subtract(
        self, batch: Batch, deltas: Iterable[Tensor], decay: Tensor, scalars: list[dict[str, Tensor]]
    ) -> None:
        """Subtract ``deltas`` and the decay of form `shrink` from the parameters of ``batch``, and move averages.

        This is one pass, over a few tensors at a time, so that deltas which are computed lazily stay in the cache.

        Args:
            batch: The batch.
            deltas: Amounts to subtract, in the shapes of the parameters.
            decay: Coefficients of the decay, [tensors].
            scalars: Scalars of each tensor, of which those of the averages are used.

        Raises:
            ValueError: The shape of a delta is not that of its parameter.
        """
        usual = not batch.averages and all(p.is_contiguous() and p.dtype == batch.dtype for p in batch.params)
        if isinstance(deltas, Scaled) and usual:
            deltas.subtract_from(batch.params, decay)
            return
        some: list[Tensor] = []
        first = 0
        for i, delta in enumerate(deltas):
            if delta.shape != batch.params[i].shape:
                raise ValueError(
                    f"Invalid update from {type(batch.rule).__name__}: its shape {tuple(delta.shape)} must be that of "
                    f"the parameter, {tuple(batch.params[i].shape)}."
                )
            some.append(delta)
            if sum(map(Tensor.numel, some)) < SUBTRACTED_AT_ONCE and i + 1 < len(batch.params):
                continue
            part = slice(first, i + 1)
            nothing: list[dict[str, Tensor]] = [{} for _ in some]
            tensors = batch.params[part], some, batch.states[part]
            only = Batch(Rule(), *tensors, nothing, [], batch.full_params[part], False, averages=batch.averages)
            dtypes = [DTYPES[only.params[0].dtype], DTYPES[delta.dtype]]
            columns = {"decay": decay[part]}
            if batch.averages:
                dtypes += [DTYPES[average[0].dtype] for average in only.state_arrays]
                for name in weight_names(batch.averages):
                    columns[name] = torch.stack([numbers[name] for numbers in scalars[part]])
            with kernel_args(only) as args:
                kernel = build_subtraction(tuple(dtypes))
                launch(kernel, args, kernel.table(columns, args.dtype).numpy())
            some, first = [], i + 1


def _scalars(batch: Batch, divisor: Tensor | None, skip: Tensor | None, at_once: bool) -> dict[str, Tensor]:
    return host_scalars(batch, divisor)


def run(
    spec: KernelSpec, args: KernelArgs, columns: Mapping[str, Tensor], skip: Tensor | None
) -> tuple[tuple[str, ...], Tensor]:
    """Implement `compiled.Run`; ``skip`` is always None, because `CpuBackend.apply` has read the flag."""
    kernel = build(spec)
    assert isinstance(columns, HostColumns)
    return kernel.sums, launch(kernel, args, columns.table(kernel.scalars, args.dtype))


def _measure(args: KernelArgs, dtype: torch.dtype) -> Tensor:
    no_scalars = np.zeros((1, 1), np.float64 if args.dtype == torch.float64 else np.float32)
    return launch(build_measure(DTYPES[dtype]), args, no_scalars)[:, 0]


def _blocks(numel: tuple[int, ...], row_sizes: tuple[int, ...] | None) -> tuple[npt.NDArray[np.int64], int, bool]:
    """Return the blocks of tensors, their number of elements, and whether each tensor is one block."""
    blocks = split(numel, BLOCK) if row_sizes is None else split_rows(numel, row_sizes, BLOCK)
    one_each = len(blocks) == len(numel) and bool((blocks[:, 0] == np.arange(len(blocks))).all())
    return blocks, sum(numel), one_each


def launch(kernel: Kernel, args: KernelArgs, scalars: npt.NDArray[np.floating]) -> Tensor:
    """Run ``kernel`` over all blocks, and add the block sums of each tensor in order: [tensors, sums], float64."""
    sizes = args.sizes
    key = BLOCK if args.row_sizes is None else (BLOCK, args.row_sizes)
    if key not in sizes.kept:
        sizes.kept[key] = _blocks(sizes.numel, args.row_sizes)
    blocks, elements, one_each = sizes.kept[key]
    # Without sums nothing is allocated: glibc tidies up at the first allocation after a backward pass.
    sums = np.zeros((len(blocks), len(kernel.sums))) if kernel.sums else _NOTHING
    run_blocks(kernel.function, len(blocks), elements, blocks, args.addresses, scalars, sums)
    if one_each or not kernel.sums:
        return torch.from_numpy(sums)
    totals = np.zeros((len(sizes.numel), len(kernel.sums)))
    np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)
