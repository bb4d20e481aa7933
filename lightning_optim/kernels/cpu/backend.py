"""The CPU backend: numba loops over blocks of all tensors at once, on as many threads as torch uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.host import is_set
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.base import Backend, Batch
from lightning_optim.kernels.compiled import DTYPES, ElementwiseSteps, KernelArgs, kernel_args, measure_args, split
from lightning_optim.kernels.cpu.codegen import build, build_measure, build_subtraction
from lightning_optim.kernels.cpu.factored import Scaled
from lightning_optim.kernels.cpu.threads import run_blocks
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.reference import apply_tensor_rule
from lightning_optim.kernels.rules import Rule, TensorRule

BLOCK = 65536
"""Elements per block, 256 KB of float32: long enough to stream memory, short enough to balance the threads."""

SUBTRACTED_AT_ONCE = 2**20
"""Number of elements of a tensor rule's updates that are subtracted in one pass."""


class CpuBackend(Backend):
    """Backend with one pass over memory for elementwise rules, which divides, updates, writes and sums."""

    name = "cpu"
    low_precision = True

    def __init__(self) -> None:
        self._elementwise = ElementwiseSteps(run)

    def why_not(self, device: torch.device) -> str | None:
        """Implement `Backend`: it runs on the CPU only."""
        return None if device.type == "cpu" else "it updates tensors in the CPU's memory only."

    def supports(self, batch: Batch) -> bool:
        """Implement `Backend`: it runs tensor rules, and elementwise rules over dtypes that kernels support."""
        return isinstance(batch.rule, TensorRule) or self._elementwise.supports(batch)

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Implement `Backend`."""
        args, kept = measure_args(grads)
        no_scalars = np.zeros((1, 1), np.float64 if args.dtype == torch.float64 else np.float32)
        norm_sq = launch(build_measure(DTYPES[kept[0].dtype]), args, no_scalars)
        return norm_sq[:, 0]

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Implement `Backend`."""
        return self._elementwise.sums(batch, divisor)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`; the host reads the flag ``skip``, which costs nothing here, so kernels need not."""
        if isinstance(batch.rule, TensorRule):
            subtract = self._subtract if batch.params[0].dtype in DTYPES else None
            update = batch.rule.update_on_cpu
            how: dict[str, Any] = {"divisor": divisor, "skip": skip, "collect": collect}
            return apply_tensor_rule(batch, update, subtract, divides=batch.rule.divides_on_cpu, **how)
        if skip is not None and is_set(skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        return self._elementwise.apply(batch, divisor=divisor, skip=None, collect=collect)

    def _subtract(self, batch: Batch, deltas: Iterable[Tensor], decay: Tensor) -> None:
        """Subtract ``deltas`` and the decay of form `shrink` from the parameters of ``batch`` in one pass.

        A few tensors are processed at a time, so that deltas which are computed lazily stay in the cache.

        Args:
            batch: The batch.
            deltas: Amounts to subtract, in the shapes of the parameters.
            decay: Coefficients of the decay, [tensors].

        Raises:
            ValueError: The shape of a delta is not that of its parameter.
        """
        if isinstance(deltas, Scaled) and all(p.is_contiguous() and p.dtype == batch.dtype for p in batch.params):
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
            only = Batch(Rule(), batch.params[part], some, nothing, nothing, [], batch.full_params[part], False)
            with kernel_args(only) as args:
                kernel = build_subtraction((DTYPES[only.params[0].dtype], DTYPES[delta.dtype]))
                launch(kernel, args, kernel.table({"decay": decay[part]}, args.dtype).numpy())
            some, first = [], i + 1


def run(
    spec: KernelSpec, args: KernelArgs, columns: Mapping[str, Tensor], skip: Tensor | None
) -> tuple[tuple[str, ...], Tensor]:
    """Implement `compiled.Run`; ``skip`` is always None, because `CpuBackend.apply` has read the flag."""
    kernel = build(spec)
    return kernel.sums, launch(kernel, args, kernel.table(columns, args.dtype).numpy())


def launch(kernel: Kernel, args: KernelArgs, scalars: npt.NDArray[np.floating]) -> Tensor:
    """Run ``kernel`` over all blocks, and add the block sums of each tensor in order: [tensors, sums], float64."""
    blocks = split(args.numel, BLOCK)
    sums = np.zeros((len(blocks), len(kernel.sums)))
    run_blocks(kernel.function, len(blocks), sum(args.numel), blocks, args.addresses, scalars, sums)
    totals = np.zeros((len(args.numel), len(kernel.sums)))
    if kernel.sums:
        np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)
