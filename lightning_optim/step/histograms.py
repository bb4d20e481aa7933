"""How large the elements of gradients, parameters and updates are: counts by powers of two, made on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.magnitude_columns import ABOVE, BELOW, COLUMNS, FIRST, KINDS, LAST, NOT_FINITE, ZERO
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.stats import sum_groups
from lightning_optim.kernels.plain import as_real
from lightning_optim.step.gradients import Gradients

__all__ = ["ABOVE", "BELOW", "COLUMNS", "FIRST", "KINDS", "LAST", "NOT_FINITE", "ZERO", "StepHistograms", "magnitudes"]

_CHUNK = 1 << 24
_FIELDS = {torch.float32: (torch.int32, 23, 0xFF), torch.float64: (torch.int64, 52, 0x7FF)}
"""By dtype: the integers of the same width, and where in them the exponent is."""


class StepHistograms:
    """Counts, around the update of one step, how large elements are, by parameter group.

    Powers of two are read off the numbers' own bits: nothing is rounded, and columns lie where 16-bit formats end
    (fp16: normal from 2**-14, nothing below 2**-24). Magnitudes only; signs are not told apart. One pass over what is
    counted; ``update`` needs a copy of the parameters for the length of the step. The host waits for nothing.

    Args:
        gradients: The gradients of the step, as they are before clipping.
        kinds: Of `KINDS`. Gradients are counted before clipping and without loss scale, parameters after the step.
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
        """Counts by kind, shape [groups, COLUMNS], float64; those of the update are NaN if the step was left out.

        Args:
            skip: Non-zero if so, shape [].
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
    """Counts of a tensor's elements by their power of two, shape [COLUMNS], on its device; NaN for a sparse tensor.

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
    for part in torch.split(flat, _CHUNK):  # so that what is made on the way stays small
        counts += _histogram(_columns(part))
    return counts


def _columns(flat: Tensor) -> Tensor:
    """The column of each element."""
    integer, shift, special = _FIELDS[flat.dtype]
    bits = flat.view(integer) & torch.iinfo(integer).max  # without the sign
    exponent = bits >> shift
    columns = (exponent - (special // 2 + FIRST - BELOW - 1)).clamp_(BELOW, ABOVE)
    return columns.masked_fill_(exponent == special, NOT_FINITE).masked_fill_(bits == 0, ZERO)


def _histogram(columns: Tensor) -> Tensor:
    if columns.device.type == "cpu":
        return torch.bincount(columns, minlength=COLUMNS)
    # bincount would make the host wait on CUDA; there histc of integers is exact and deterministic.
    columns = columns.int() if columns.device.type == "cuda" else columns.float()
    return torch.histc(columns, COLUMNS, 0, COLUMNS - 1)


def _unscaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None or grad.layout != torch.strided:
        return grad
    part = local(grad.detach())
    return part.to(torch.promote_types(part.dtype, torch.float32)) / scale.to(part.device)
