"""The interface of clip rules, and the forms of their decision: one divisor, a divisor of each unit, or a clamp."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.fragment import Fragment
from lightning_optim.core.stats import GradStats

State = Mapping[str, Tensor]
"""State of a rule, by name; tensors on the device."""

STATELESS: State = MappingProxyType({})


class ClipRule(ABC):
    """Base class of clip rules, which decide how much the gradients of a step are scaled down.

    A rule is two pure functions on the device, neither of which may synchronise with the host: calling it returns the
    divisor of the gradients, and `updated` its next state. A rule holds no tensors, so that one object can serve
    several optimizers. `Clipper` holds the state, under one contract for all rules:

    - A step that is skipped, because a gradient is not finite or for any other reason, does not change the state.
    - The state has ``steps``, the number of accepted steps so far, int64, shape [], which warmups count.
    - The state is saved in checkpoints.

    To add one, subclass, define `__call__`, and use it as ``GradientClipping(method=MyRule())``, or by name after
    `lightning_optim.register`.

    Example:
        >>> class Halve(ClipRule):
        ...     def __call__(self, stats, state=STATELESS, limit=1.0):
        ...         return torch.full_like(stats.total_norm(), 2.0)
        >>> Halve()(GradStats(torch.tensor([9.0, 16.0]), group_sizes=(2,)))
        tensor(2.)
    """

    per_parameter: ClassVar[tuple[str, ...]] = ()
    """Names of state with one value for each parameter of the optimizer, including parameters without a gradient."""

    reads_units: ClassVar[bool] = False
    """Whether the rule needs the norm of each row, which is not available for the flat shards of FSDP1."""

    spans: ClassVar[Literal["tensor", "norm", "step"]] = "step"
    """What the divisor and the next state of a tensor depend on: on that tensor alone, on its own and the norm of all
    gradients, or on all tensors of the step. `lightning_optim.release_gradients` decides tensor by tensor."""

    @abstractmethod
    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor | Clip:
        """Decide how the gradients of a step are clipped.

        Args:
            stats: Statistics of the gradients.
            state: The present state of the rule.
            limit: Factor of a schedule on the rule's limit at this step, above 0.

        Returns:
            The divisor, at least 1, shape [] or [tensors], on the device of ``stats``; or a `Clip` of another form.
        """

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return the state before the first step, on the CPU; empty for a rule without state.

        Args:
            parameters: Number of parameters of the optimizer.
        """
        return {}

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Return the state after an accepted step, in new tensors of the same shapes.

        Args:
            stats: Statistics of the gradients.
            state: The state before.
            clip: The decision that the call returned; a divisor as a `Divisor`.
        """
        return {}

    per_tensor: ClassVar[bool] = False
    """Whether the divisor of `fragment` is a vector."""

    def fragment(self, group_names: Sequence[str]) -> Fragment | None:
        """Return the same decision and next state as lines of a program, which costs one launch; None for none.

        A subclass that changes the decision changes this, too; otherwise it is not used. The host gives `numbers` and
        `vectors` in the order in which the fragment names them.

        Args:
            group_names: Names of the parameter groups.
        """
        return None

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the numbers of the fragment at this step.

        Args:
            limit: Factor of a schedule on the rule's limit.
        """
        return ()

    def vectors(self, numel: Sequence[int], group_names: Sequence[str], groups: Sequence[int]) -> list[list[float]]:
        """Return the vectors of the fragment, one value for each parameter.

        Args:
            numel: Number of elements of each parameter.
            group_names: Names of the parameter groups.
            groups: Index of the group of each parameter.
        """
        return []

    def check(self, group_names: Collection[str], names: Collection[str]) -> None:  # noqa: B027 - most need none
        """Check the rule against the optimizer, once.

        Args:
            group_names: Names of the parameter groups.
            names: Names of the parameters.

        Raises:
            ValueError: The rule refers to a group or parameter that does not exist.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class Clip(ABC):
    """The decision of a rule for one step."""

    @abstractmethod
    def flag(self) -> Tensor:
        """Return whether anything is scaled down, bool, shape []."""

    @abstractmethod
    def norm_sq_after(self, stats: GradStats) -> Tensor | None:
        """Return the square sum of each gradient after clipping, shape [tensors]; None if it has to be read."""

    @abstractmethod
    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """Clip the gradients in place, in one pass.

        Args:
            grads: All gradients in the order of ``stats``, any shapes; of DTensors, their local shards.
            scale: The loss scale that is still in them, shape []; None for none.
        """


class Divisor(Clip):
    """Division of the gradients by one number, or of each tensor by its own.

    Args:
        values: At least 1, shape [] or [tensors].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def flag(self) -> Tensor:
        """Return whether any divisor is above 1, bool, shape []."""
        return (self.values > 1).any()

    def norm_sq_after(self, stats: GradStats) -> Tensor:
        """Return the square sums after division, without another read, shape [tensors]."""
        return stats.norm_sq / self.values.square()

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """Multiply each element once; one launch in all for a single divisor, else one per tensor."""
        wide = any(grad.dtype == torch.float64 for grad in grads)
        factor = self.values.reciprocal().to(torch.float64 if wide else torch.float32)
        if factor.dim() == 0:
            torch._foreach_mul_(list(grads), factor)
        else:
            for grad, own in zip(grads, factor.unbind(), strict=True):
                grad.mul_(own.to(grad.device, non_blocking=True))


class UnitDivisor(Clip):
    """Division of each output unit (row) of each gradient by its own number.

    Args:
        values: At least 1; one tensor for each gradient, with dimensions of size 1 where it is the same for all.
        norm_sq: Square sum of each gradient before, shape [tensors].
        norm_sq_after: Square sum of each gradient after, shape [tensors].
    """

    def __init__(self, values: Sequence[Tensor], norm_sq: Tensor, norm_sq_after: Tensor) -> None:
        self.values = values
        self._before, self._after = norm_sq, norm_sq_after

    def flag(self) -> Tensor:
        """Return whether any gradient has become smaller, bool, shape []."""
        return (self._after < self._before).any()

    def norm_sq_after(self, stats: GradStats) -> Tensor:
        """Return the square sums after division, without another read, shape [tensors]."""
        return self._after

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """Divide each element once, one launch per tensor."""
        for grad, divisor in zip(grads, self.values, strict=True):
            wide = torch.promote_types(grad.dtype.to_real(), torch.float32)
            grad.div_(divisor.to(grad.device, wide, non_blocking=True))


class Clamp(Clip):
    """Clamp of each element to [-limit, limit]; for complex gradients, of real and imaginary parts.

    Args:
        limit: The limit.
        largest: The largest absolute value in each gradient, shape [tensors].
    """

    def __init__(self, limit: float, largest: Tensor) -> None:
        self.limit, self.largest = limit, largest

    def flag(self) -> Tensor:
        """Return whether any element is beyond the limit, bool, shape []."""
        return (self.largest > self.limit).any()

    def norm_sq_after(self, stats: GradStats) -> None:
        """Return None: the square sums after a clamp have to be read."""

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """Clamp each element, one launch per tensor."""
        for grad in grads:
            limit = self.limit if scale is None else scale.to(grad.device, non_blocking=True) * self.limit
            if grad.is_complex():  # The clamp is symmetric, so a lazy conjugation needs no resolution.
                grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
            grad.clamp_(-limit, limit)  # type: ignore[arg-type] # numbers and tensors alike, which the stubs deny


def gather(values: Tensor, stats: GradStats) -> Tensor:
    """Select the entries of per-parameter state that belong to tensors with a gradient.

    Args:
        values: One value for each parameter, shape [parameters].
        stats: Statistics of the gradients, with the indices of their tensors.

    Returns:
        Shape [tensors].
    """
    return values if stats.places is None else values[stats.places]


def scatter(values: Tensor, stats: GradStats, new: Tensor) -> Tensor:
    """Replace the entries of per-parameter state that belong to tensors with a gradient.

    Args:
        values: One value for each parameter, shape [parameters].
        stats: Statistics of the gradients, with the indices of their tensors.
        new: The new values, shape [tensors].

    Returns:
        A new tensor of the shape and dtype of ``values``.
    """
    new = new.to(values.dtype)
    return new if stats.places is None else values.scatter(0, stats.places, new)


def above_zero(name: str, value: float, usual: float, instead: str = "leave gradient clipping out") -> float:
    """Return ``value`` as a float.

    Args:
        name: Name of the argument, for the message.
        value: What was given.
        usual: An example of a good value.
        instead: Way to turn clipping off, for a message about a value of 0.

    Raises:
        ValueError: ``value`` is not a finite number above 0.
    """
    if not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"Invalid {name}={value!r}: it must be a finite number above 0, for instance {usual}. For no clipping, "
            f"{instead}."
        )
    return float(value)


def whole(name: str, value: int, least: int, usual: int) -> int:
    """Return ``value`` as an int.

    Args:
        name: Name of the argument, for the message.
        value: What was given.
        least: The least value allowed.
        usual: An example of a good value.

    Raises:
        ValueError: ``value`` is not a whole number of at least ``least``.
    """
    if isinstance(value, bool) or value != int(value) or value < least:
        raise ValueError(f"Invalid {name}={value!r}: it must be a whole number of at least {least}, such as {usual}.")
    return int(value)
