"""What a clip rule is, and the three forms of what it decides."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.core.stats import GradStats

State = Mapping[str, Tensor]
"""What a rule remembers, by name; on the device."""

STATELESS: State = MappingProxyType({})


class ClipRule(ABC):
    """How much the gradients are scaled down this step.

    A rule is two pure functions on the device, neither of which may synchronise with the host: calling it gives what
    the gradients are divided by, and `updated` what it then remembers. It holds no tensors itself, so that one object
    serves several optimizers. `Clipper` keeps the state, under one contract for all rules:

    - A step that is skipped, for a gradient that is not finite or for any other reason, leaves the state as it was.
    - The state has ``steps``, the steps accepted so far, int64, shape []: warmups count these.
    - The state is in checkpoints.
    """

    per_parameter: ClassVar[tuple[str, ...]] = ()
    """Names of the state that has one value for each parameter of the optimizer, with a gradient or not."""

    reads_units: ClassVar[bool] = False
    """Whether it needs the norm of each row, so that no row may be cut in pieces that only FSDP can put together."""

    @abstractmethod
    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor | Clip:
        """What to do with these gradients.

        Args:
            stats: The gradients.
            state: What the rule remembers.
            limit: By what a schedule multiplies the limit at this step.

        Returns:
            The divisor, at least 1, shape [] or [tensors], on the device of ``stats``; or a `Clip` of another form.
        """

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """State before the first step, on the host; nothing for a rule that remembers nothing.

        Args:
            parameters: How many parameters the optimizer has.
        """
        return {}

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """The state after a step that is accepted, new tensors.

        Args:
            stats: The gradients.
            state: The state before.
            clip: What the call returned.
        """
        return {}

    def check(self, group_names: Collection[str], names: Collection[str]) -> None:  # noqa: B027 - most need none
        """Raises ValueError if the rule speaks of groups or parameters that are not there."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class Clip(ABC):
    """What a rule has decided for one step."""

    @abstractmethod
    def flag(self) -> Tensor:
        """Whether anything is scaled down, bool, shape []."""

    @abstractmethod
    def norm_sq_after(self, stats: GradStats) -> Tensor | None:
        """Square sum of each gradient as the optimizer will see it, shape [tensors]; None if it has to be read."""

    @abstractmethod
    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """Does it to the gradients, in place and in one pass.

        Args:
            grads: All gradients in the order of ``stats``; of DTensors, their shards.
            scale: The loss scale that is still in them, if any.
        """


class Divisor(Clip):
    """Gradients are divided by one number, or each tensor by its own.

    Args:
        values: At least 1, shape [] or [tensors].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def flag(self) -> Tensor:
        """Whether any divisor is above 1."""
        return (self.values > 1).any()

    def norm_sq_after(self, stats: GradStats) -> Tensor:
        """Known without another read."""
        return stats.norm_sq / self.values.square()

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """One multiplication of each element; one launch in all for a single divisor, else one per tensor."""
        wide = any(grad.dtype == torch.float64 for grad in grads)
        factor = self.values.reciprocal().to(torch.float64 if wide else torch.float32)
        if factor.dim() == 0:
            torch._foreach_mul_(list(grads), factor)
        else:
            for grad, own in zip(grads, factor.unbind(), strict=True):
                grad.mul_(own.to(grad.device, non_blocking=True))


class UnitDivisor(Clip):
    """Each output unit (row) of each gradient is divided by its own number.

    Args:
        values: At least 1; one tensor for each gradient, with dimensions of size 1 where it is the same for all.
        norm_sq: Square sum of each gradient before, shape [tensors].
        norm_sq_after: The same after.
    """

    def __init__(self, values: Sequence[Tensor], norm_sq: Tensor, norm_sq_after: Tensor) -> None:
        self.values = values
        self._before, self._after = norm_sq, norm_sq_after

    def flag(self) -> Tensor:
        """Whether any gradient has become smaller."""
        return (self._after < self._before).any()

    def norm_sq_after(self, stats: GradStats) -> Tensor:
        """Known without another read."""
        return self._after

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """One division of each element, one launch per tensor."""
        for grad, divisor in zip(grads, self.values, strict=True):
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad.div_(divisor.to(grad.device, wide, non_blocking=True))


class Clamp(Clip):
    """Elements are brought into [-limit, limit].

    Args:
        limit: The limit.
        largest: The largest absolute value in each gradient, shape [tensors].
    """

    def __init__(self, limit: float, largest: Tensor) -> None:
        self.limit, self.largest = limit, largest

    def flag(self) -> Tensor:
        """Whether any element is beyond the limit."""
        return (self.largest > self.limit).any()

    def norm_sq_after(self, stats: GradStats) -> None:
        """Unknown."""

    def apply_(self, grads: Sequence[Tensor], scale: Tensor | None) -> None:
        """One pass, one launch per tensor."""
        for grad in grads:
            limit = self.limit if scale is None else scale.to(grad.device, non_blocking=True) * self.limit
            grad.clamp_(-limit, limit)  # type: ignore[arg-type] # numbers and tensors alike, which the stubs deny


def gather(values: Tensor, stats: GradStats) -> Tensor:
    """Of state with one value for each parameter, that of the tensors which have a gradient."""
    return values if stats.places is None else values[stats.places]


def scatter(values: Tensor, stats: GradStats, new: Tensor) -> Tensor:
    """The same with new values for those."""
    new = new.to(values.dtype)
    return new if stats.places is None else values.scatter(0, stats.places, new)


def above_zero(name: str, value: float, usual: float, instead: str = "leave gradient clipping out") -> float:
    """``value`` as a float; a ValueError unless it is a finite number above 0."""
    if not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"Invalid {name}={value!r}: it must be a finite number above 0, for instance {usual}. To not clip, "
            f"{instead}."
        )
    return float(value)


def whole(name: str, value: int, least: int, usual: int) -> int:
    """``value``; a ValueError unless it is a whole number of at least ``least``."""
    if isinstance(value, bool) or value != int(value) or value < least:
        raise ValueError(f"Invalid {name}={value!r}: it must be a whole number of at least {least}, such as {usual}.")
    return int(value)
