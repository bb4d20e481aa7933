"""What an update rule of whole matrices is: three parts, of which one needs whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_optim.kernels.rules import TensorRule


class StepOnCpu(Protocol):
    """A step of tensors that belong together, taken in place by kernels of the cpu backend.

    It serves where nothing is measured or skipped and the decay has the form `shrink`, with gradients as they are in
    memory; 0-d state is the caller's.
    """

    is_shared: bool
    """Whether it can be divided over ranks, of which each then has the results of `directions` of all."""

    def step(self) -> None:
        """Take all of it."""

    def directions(self) -> list[Tensor]:
        """Return what `MatrixRule.whole` calls `direction` of each tensor, in its shape, contiguous."""

    def finish(self, directions: Sequence[Tensor]) -> None:
        """Take the rest, given the results of `directions` of all tensors."""


Like = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor that another rank sends."""


class MatrixRule(TensorRule):
    """Rule in three parts, of which only the middle one needs whole tensors, so that ranks can share its work.

    `update` is the composition of the parts. Where a parameter is sharded over ranks, `advance`, `prepare` and `after`
    run on each rank's shard, and `whole` on one rank, its owner; where ranks have copies of a parameter, the owner's
    result is sent to the others. What travels is what `prepare` gives, in `sent_dtype`, and what `returned` describes.
    """

    sent_dtype: ClassVar[torch.dtype] = torch.bfloat16
    """Dtype in which the results of `prepare` are sent to the owner."""

    local_state: ClassVar[tuple[str, ...]] = ()
    """Names of states in the shape of the parameter that `advance` updates; the others belong to `whole`."""

    def on_cpu(self, batch: Any, columns: Mapping[str, Tensor], rows: Sequence[int]) -> StepOnCpu | None:
        """Return the step of tensors that belong together in compiled passes; None if there are none for them.

        As of `update_on_cpu`, a subclass that does not define this method itself has none.

        Args:
            batch: The tensors, a `Batch`.
            columns: Scalars by name, [all tensors] each, float64, `inverse_divisor` and `decay` among them.
            rows: Places of these tensors among all.
        """
        return None

    def divisible(self, param: Tensor, group: Mapping[str, Any]) -> tuple[float, float]:
        """Implement `TensorRule.divisible`: the cost, and a result in `sent_dtype`."""
        return self.cost(param, group), param.numel() * self.sent_dtype.itemsize

    def advance(
        self, grad: Tensor, state: Mapping[str, Tensor], scalars: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the new values of `local_state`, computed elementwise.

        Args:
            grad: A gradient as for `update`, whole or one shard of it.
            state: The state as for `update`.
            scalars: The scalars as for `update`.
            group: The parameter group.
        """
        raise NotImplementedError

    def prepare(
        self, grad: Tensor, state: Mapping[str, Tensor], scalars: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> Tensor:
        """Return what `whole` needs of a tensor, in its shape, computed elementwise.

        Args:
            grad: As for `advance`.
            state: The result of `advance`.
            scalars: As for `advance`.
            group: As for `advance`.
        """
        raise NotImplementedError

    def whole(
        self,
        tensors: Iterable[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Compute what needs whole tensors.

        Args:
            tensors: The results of `prepare`, whole, in the dtype of the arithmetic or in `sent_dtype`. They are
                iterated once, so that none needs to be kept.
            states: States without `local_state`, whole, as for `update`.
            scalars: As for `update`.
            groups: As for `update`.

        Returns:
            For each tensor the arguments of `after` by name, as described by `returned`, and the new states. Further
            arguments that save `after` work are passed on one device only.
        """
        raise NotImplementedError

    def returned(self, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Like]:
        """Return shapes and dtypes of the tensors by name that `whole` passes to `after`.

        A shape is that of the parameter, or has as many dimensions, some of which are 1: a rank then receives the part
        that belongs to its shard.

        Args:
            param: The parameter, whole or a DTensor, of which only the shape may be read.
            group: Its parameter group.
            dtype: The dtype of the arithmetic.
        """
        raise NotImplementedError

    def after(
        self,
        results: Sequence[dict[str, Tensor]],
        params: Sequence[Tensor],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Iterator[Tensor]:
        """Compute elementwise the amounts to subtract, in the dtype of the arithmetic.

        Args:
            results: The results of `whole`, or the parts of them that belong to one shard of each tensor.
            params: The parameters, whole or DTensors, of which only the shapes may be read.
            scalars: As for `update`.
            groups: As for `update`.

        Yields:
            The amounts, with as many elements as the main result has, in any shape.
        """
        raise NotImplementedError

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[Iterable[Tensor], list[dict[str, Tensor]]]:
        """Implement `TensorRule.update`."""
        new_states: list[dict[str, Tensor]] = []

        def tensors() -> Iterator[Tensor]:
            for grad, state, numbers, group in zip(grads, states, scalars, groups, strict=True):
                new_states.append(self.advance(grad, state, numbers, group))
                yield self.prepare(grad, new_states[-1], numbers, group)

        results = self.whole(tensors(), states, scalars, groups)
        for new, (_, others) in zip(new_states, results, strict=True):
            new |= others
        deltas = self.after([result for result, _ in results], params, scalars, groups)
        shapes = [grad.shape for grad in grads]
        return (delta.view(shape) for delta, shape in zip(deltas, shapes, strict=True)), new_states
