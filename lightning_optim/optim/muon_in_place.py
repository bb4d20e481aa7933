"""Muon's step on the CPU in compiled passes: one before the products of matrices, and one after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_optim.kernels.base import Batch
from lightning_optim.optim.matrix_form import MatrixForm, matrix_form
from lightning_optim.optim.matrix_scale import step_ratio
from lightning_optim.optim.newton_schulz import orthogonalize_in_parts
from lightning_optim.optim.ns_coefficients import iterations

if TYPE_CHECKING:
    from lightning_optim.kernels.cpu.momentum import Place


def step_in_place(batch: Batch, columns: Mapping[str, Tensor], rows: Sequence[int]) -> bool:
    """Take the step of matrices that belong together, as `TensorRule.step_on_cpu` does.

    Args:
        batch: Matrices of one shape, or tensors with pieces of the same shapes.
        columns: Scalars by name, [all tensors] each.
        rows: Places of these tensors among all.

    Returns:
        Whether it could: all tensors are contiguous and their pieces lie in memory as matrices.
    """
    from lightning_optim.kernels.cpu import momentum

    params, grads, groups = batch.params, batch.grads, batch.groups
    momenta = [state["momentum_buffer"] for state in batch.states]
    places = [_places(matrix_form(param, group), param.shape) for param, group in zip(params, groups, strict=True)]
    nesterov, *others = {group["nesterov"] for group in groups}
    contiguous = all(map(Tensor.is_contiguous, [*params, *grads, *momenta]))
    if others or not contiguous or batch.dtype != torch.float32 or not all(places):
        return False
    schedule = iterations(groups[0]["ns_coefficients"], groups[0]["ns_steps"])
    names = ("inverse_divisor", "one_minus_momentum", "momentum", "lr", "decay")
    numbers = np.stack([columns[name].numpy() for name in names], 1)[rows].astype(np.float32)
    for piece in zip(*places, strict=True):
        directions = orthogonalize_in_parts(
            momentum.stack(grads, momenta, piece, numbers[:, :3], nesterov=nesterov),
            schedule,
            groups[0]["eps"],
            torch.bfloat16,
        )
        ratios = [step_ratio(piece[0].rows, piece[0].columns, group["adjust_lr_fn"]) for group in groups]
        after = numbers[:, [0, 1, 3, 4]]
        after[:, 2] *= np.array(ratios, np.float32)
        momentum.update(params, grads, momenta, list(map(Tensor.contiguous, directions)), piece, after)
    return True


@lru_cache(maxsize=4096)
def _places(form: MatrixForm, shape: torch.Size) -> tuple[Place, ...] | None:
    """Return where the results of `MatrixForm.take` lie in a contiguous tensor; None if it has to copy."""
    from lightning_optim.kernels.cpu.momentum import Place

    whole = torch.empty(shape, dtype=torch.uint8, device="cpu")
    places = []
    for taken in form.take(whole):
        stack = taken if taken.dim() == 3 else taken[None]
        first = stack.data_ptr() - whole.data_ptr()
        if not (0 <= first < whole.numel() and stack.stride(2) == 1 and stack.numel()):
            return None
        places.append(Place(first, len(stack), stack.stride(0), stack.shape[1], stack.shape[2], stack.stride(1)))
    return tuple(places)
