"""Muon's step on the CPU in compiled passes: one before the products of matrices, and one after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class StepInPlace:
    """A step of matrices that belong together; implements `matrix_rule.StepOnCpu`.

    Args:
        batch: Matrices of one shape, or tensors with pieces of the same shapes.
        columns: Scalars by name, [all tensors] each.
        rows: Places of these tensors among all.
        eps: Smallest norm that the Newton-Schulz iteration divides by.
    """

    is_shared = True

    def __init__(self, batch: Batch, columns: Mapping[str, Tensor], rows: Sequence[int], eps: float) -> None:
        self._params, self._grads, self._groups = batch.params, batch.grads, batch.groups
        self._momenta = [state["momentum_buffer"] for state in batch.states]
        self._forms = [matrix_form(param, group) for param, group in zip(batch.params, batch.groups, strict=True)]
        self._places = [_places(form, param.shape) for form, param in zip(self._forms, batch.params, strict=True)]
        self._arithmetic, self._eps = batch.dtype, eps
        names = ("inverse_divisor", "one_minus_momentum", "momentum", "lr", "decay")
        self._numbers = np.stack([columns[name].numpy() for name in names], 1)[rows].astype(np.float32)

    def fits(self) -> bool:
        """Return whether all tensors are contiguous and their pieces lie in memory as matrices."""
        contiguous = all(map(Tensor.is_contiguous, [*self._params, *self._grads, *self._momenta]))
        alike = len({group["nesterov"] for group in self._groups}) == 1
        return alike and contiguous and self._arithmetic == torch.float32 and all(self._places)

    def step(self) -> None:
        """Implement `StepOnCpu`."""
        for number, piece in enumerate(self._pieces()):
            directions = self._orthogonal(piece)
            self._update(piece, directions, self._row_steps(number, directions))

    def directions(self) -> list[Tensor]:
        """Implement `StepOnCpu`."""
        taken: list[list[Tensor]] = [[] for _ in self._params]
        for piece in self._pieces():
            stacks = self._orthogonal(piece)
            whole = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
            for found, stack in zip(taken, whole.split_with_sizes([place.matrices for place in piece]), strict=True):
                found.append(stack)
        return [
            form.put(pieces).reshape(param.shape)
            for form, pieces, param in zip(self._forms, taken, self._params, strict=True)
        ]

    def finish(self, directions: Sequence[Tensor]) -> None:
        """Implement `StepOnCpu`."""
        for piece in self._pieces():
            self._update(piece, directions, None, like_params=True)

    def _pieces(self) -> Iterator[tuple[Place, ...]]:
        return zip(*(places for places in self._places if places is not None), strict=True)

    def _orthogonal(self, piece: Sequence[Place]) -> list[Tensor]:
        """Return consecutive parts of the stack of orthogonal matrices of a piece of all tensors."""
        from lightning_optim.kernels.cpu import momentum

        group = self._groups[0]
        schedule = iterations(group["ns_coefficients"], group["ns_steps"])
        numbers = self._numbers[:, :3]
        given = momentum.stack(self._grads, self._momenta, piece, numbers, nesterov=group["nesterov"])
        done = orthogonalize_in_parts(given, schedule, self._eps, torch.bfloat16)
        return list(map(Tensor.contiguous, done))

    def _row_steps(self, number: int, directions: list[Tensor]) -> Tensor | None:
        """Return the factor of each row, [matrices, rows]; None for the learning rate for the shape.

        Args:
            number: Number of the piece.
            directions: The result of `_orthogonal`.
        """
        return None

    def _update(
        self,
        piece: Sequence[Place],
        directions: Sequence[Tensor],
        steps: Tensor | None,
        like_params: bool = False,
    ) -> None:
        from lightning_optim.kernels.cpu import momentum

        numbers = self._numbers[:, [0, 1, 3, 4]]
        ratios = [step_ratio(piece[0].rows, piece[0].columns, group["adjust_lr_fn"]) for group in self._groups]
        numbers[:, 2] *= np.array(ratios, np.float32)
        slots = (self._params, self._grads, self._momenta, directions)
        momentum.update(*slots, piece, numbers, steps, like_params=like_params)


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
