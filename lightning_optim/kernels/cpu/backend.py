"""The CPU backend: numba loops over blocks of all tensors at once, on torch's number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.host import is_set
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.compiled import DTYPES, CompiledBackend, Operands, operands_of, scalar_table, split
from lightning_optim.kernels.cpu.codegen import Kernel, build, build_measure, build_subtraction
from lightning_optim.kernels.cpu.factored import Scaled
from lightning_optim.kernels.cpu.threads import run_blocks
from lightning_optim.kernels.reference import apply_tensor_rule
from lightning_optim.kernels.rules import Rule, TensorRule, UpdateRule

BLOCK = 65536
"""Elements per block: 256 KB of float32, so that a block's few arrays stream while threads stay evenly loaded."""

SUBTRACTED_AT_ONCE = 2**20
"""Elements of a tensor rule's updates that are subtracted in one pass."""


class CpuBackend(CompiledBackend):
    """One pass over memory for elementwise rules: divide, update, write and sum."""

    name = "cpu"
    low_precision = True

    def why_not(self, device: torch.device) -> str | None:
        """It runs on the CPU only."""
        return None if device.type == "cpu" else "it updates tensors in the CPU's memory only."

    def supports(self, batch: Batch) -> bool:
        """Tensor rules, and what all compiled backends do."""
        return isinstance(batch.rule, TensorRule) or super().supports(batch)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """See `Backend`. To read the flag is free here, so that kernels need not."""
        if isinstance(batch.rule, TensorRule):
            subtract = self._subtract if batch.params[0].dtype in DTYPES else None
            update = batch.rule.update_on_cpu
            return apply_tensor_rule(batch, update, subtract, divisor=divisor, skip=skip, collect=collect)
        if is_set(skip):
            return torch.full((len(batch.params), len(STEP_SUMS)), math.nan, device="cpu") if collect else None
        return super().apply(batch, divisor=divisor, skip=None, collect=collect)

    def run(
        self,
        operands: Operands,
        rule: type[UpdateRule],
        purpose: str,
        cautious: bool,
        columns: Mapping[str, Tensor],
        skip: Tensor | None,
    ) -> tuple[tuple[str, ...], Tensor]:
        """See `CompiledBackend`."""
        storing = (operands.decay_form, operands.kahan, operands.stochastic, operands.quantized)
        kernel = build(rule, operands.dtypes, purpose, cautious, *storing)  # type: ignore[arg-type] # mypy: type not Hashable
        table = scalar_table(columns, kernel.scalars, operands.dtype)
        return kernel.sums, _run(kernel, operands, table.numpy())

    def run_measure(self, operands: Operands) -> Tensor:
        """See `CompiledBackend`."""
        kernel = build_measure(operands.dtypes[0])
        wide = np.float64 if operands.dtype == torch.float64 else np.float32
        return _run(kernel, operands, np.zeros((1, 1), wide))[:, 0]

    def _subtract(self, batch: Batch, deltas: Iterable[Tensor], decay: Tensor) -> None:
        """Subtract ``deltas``, and the plain form of decay ([tensors]), from the parameters of ``batch`` in one pass.

        Some tensors at a time: deltas that are made only when they are taken then stay in the cache.
        """
        if isinstance(deltas, Scaled) and all(p.is_contiguous() and p.dtype == batch.dtype for p in batch.params):
            deltas.subtract_from(batch.params, decay)
            return
        some: list[Tensor] = []
        first = 0
        for i, delta in enumerate(deltas):
            if delta.shape != batch.params[i].shape:
                raise ValueError(
                    f"{type(batch.rule).__name__} gave an update of shape {tuple(delta.shape)} for a parameter of "
                    f"shape {tuple(batch.params[i].shape)}; needed is one like the parameter."
                )
            some.append(delta)
            if sum(map(Tensor.numel, some)) < SUBTRACTED_AT_ONCE and i + 1 < len(batch.params):
                continue
            part = slice(first, i + 1)
            nothing: list[dict[str, Tensor]] = [{} for _ in some]
            only = Batch(Rule(), batch.params[part], some, nothing, nothing, [], batch.wholes[part], False)
            with operands_of(only) as operands:
                kernel = build_subtraction(operands.dtypes)
                _run(kernel, operands, scalar_table({"decay": decay[part]}, kernel.scalars, operands.dtype).numpy())
            some, first = [], i + 1


def _run(kernel: Kernel, operands: Operands, scalars: npt.NDArray[np.floating]) -> Tensor:
    """Run ``kernel`` over all blocks, and add each tensor's block sums in their order: [tensors, sums], float64."""
    blocks = split(operands.numel, BLOCK)
    sums = np.zeros((len(blocks), len(kernel.sums)))
    run_blocks(lambda first, last: kernel.run(first, last, blocks, operands.addresses, scalars, sums), len(blocks))
    totals = np.zeros((len(operands.numel), len(kernel.sums)))
    if kernel.sums:
        np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)
