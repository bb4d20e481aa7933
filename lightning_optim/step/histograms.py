"""Histograms of the magnitudes of gradients, parameters and updates: counts by powers of two, made on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.stats import sum_groups
from lightning_optim.kernels.plain import as_real
from lightning_optim.step.gradients import Gradients

KINDS = ("grad", "param", "update")

FIRST, LAST = -40, 15
"""Exponents e of the columns that count |x| in [2**e, 2**(e + 1)): 9e-13 to 65536, beyond which fp16 is infinite."""

ZERO, BELOW = 0, 1
"""Columns of exact zeros, and of values smaller than 2**FIRST."""
COLUMNS = LAST - FIRST + 5
ABOVE, NOT_FINITE = COLUMNS - 2, COLUMNS - 1
"""Columns of values of at least 2**(LAST + 1), and of NaN and infinities."""

_CHUNK = 1 << 24
_FIELDS = {torch.float32: (torch.int32, 23, 0xFF), torch.float64: (torch.int64, 52, 0x7FF)}
"""For each dtype: the integer dtype of the same width, the lowest bit of the exponent, and the exponent of infinity."""


class StepHistograms:
    """Counts of elements by magnitude around the update of one step, for each parameter group.

    Powers of two are read from the exponent bits, so nothing is rounded, and the edges of columns are where 16-bit
    formats end (fp16: normal from 2**-14, nothing below 2**-24). Signs are ignored. The cost is one pass over what is
    counted; ``update`` needs a copy of the parameters for the duration of the step. The host does not wait.

    Args:
        gradients: The gradients of the step, before clipping.
        kinds: Those of `KINDS` to count. Gradients are counted before clipping and without loss scale, parameters after
            the step.
    """

    def __init__(self, gradients: Gradients, kinds: Collection[str]) -> None:
        self._gradients, self._kinds = gradients, kinds
        self._counts: dict[str, Tensor] = {}
        self._before: list[Tensor] = []
        if "grad" in kinds:
            self._counts["grad"] = self._count([_unscaled(grad, gradients.scale) for grad in gradients.grads])
        if "update" in kinds:
            self._before = [local(param.detach()).clone() for param in gradients.params]

    @torch.no_grad()
    def after(self, skip: Tensor | None) -> dict[str, Tensor]:
        """Return the counts after the update.

        Args:
            skip: Non-zero if the step was skipped, shape []; None if nothing can skip it.

        Returns:
            By kind, float64, shape [groups, COLUMNS]; those of the update are NaN if the step was skipped.
        """
        params = [local(param.detach()) for param in self._gradients.params]
        if "param" in self._kinds:
            self._counts["param"] = self._count(params)
        if "update" in self._kinds:
            changes = self._before
            torch._foreach_sub_(changes, params)
            counts = self._count(changes)
            self._counts["update"] = (
                counts if skip is None else counts.masked_fill(skip.to(counts.device) > 0, torch.nan)
            )
        self._before = []
        return self._counts

    def _count(self, parts: Sequence[Tensor]) -> Tensor:
        device = parts[0].device
        rows = torch.stack([magnitudes(part).to(device, torch.float64, non_blocking=True) for part in parts])
        rows = self._gradients.sum_shards(sum_over_shards(rows, self._gradients.params))
        return sum_groups(rows, self._gradients.group_sizes)


@torch.no_grad()
def magnitudes(tensor: Tensor) -> Tensor:
    """Count the elements of a tensor by their power of two.

    Args:
        tensor: Any shape and floating or complex dtype; for a DTensor the local shard is counted.

    Returns:
        Shape [COLUMNS], float64 where the device has it, on the device of ``tensor``; NaN for a sparse tensor.

    Example:
        >>> counts = magnitudes(torch.tensor([0.0, 1.0, 1.5, -2.0, float("inf")]))
        >>> [counts[ZERO].item(), counts[2 - FIRST].item(), counts[3 - FIRST].item(), counts[NOT_FINITE].item()]
        [1.0, 2.0, 1.0, 1.0]
    """
    if tensor.layout != torch.strided:
        return torch.full((COLUMNS,), torch.nan, device=tensor.device)
    flat = as_real(local(tensor.detach())).reshape(-1)
    if flat.dtype not in _FIELDS:
        flat = flat.float()
    counts = torch.zeros(COLUMNS, dtype=widest_dtype(flat.device), device=flat.device)
    for part in torch.split(flat, _CHUNK):  # Chunks keep the temporary tensors small.
        counts += _histogram(_columns(part))
    return counts


def _columns(flat: Tensor) -> Tensor:
    """Return the column of each element, integers of the width of ``flat``, shape [elements]."""
    integer, shift, special = _FIELDS[flat.dtype]
    bits = flat.view(integer) & torch.iinfo(integer).max  # This clears the sign bit.
    exponent = bits >> shift
    columns = (exponent - (special // 2 + FIRST - BELOW - 1)).clamp_(BELOW, ABOVE)
    return columns.masked_fill_(exponent == special, NOT_FINITE).masked_fill_(bits == 0, ZERO)


def _histogram(columns: Tensor) -> Tensor:
    if columns.device.type == "cpu":
        return torch.bincount(columns, minlength=COLUMNS)
    # On CUDA bincount would make the host wait; there histc of integers is exact and deterministic.
    columns = columns.int() if columns.device.type == "cuda" else columns.float()
    return torch.histc(columns, COLUMNS, 0, COLUMNS - 1)


def _unscaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None or grad.layout != torch.strided:
        return grad
    part = local(grad.detach())
    return part.to(torch.promote_types(part.dtype, torch.float32)) / scale.to(part.device)
