"""Detectors: decisions on the device, from one read of the gradients, whether this step must be skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optim.core.registry import Registry, snake_case
from lightning_optim.core.stats import GradStats


class Detector(ABC):
    """Decision, made on the device, whether the coming update must be skipped.

    To add one, subclass, define `__call__`, and pass it to ``DivergenceGuard(detectors=[...])``, or to `StepPipeline`
    in a plain loop. The guard reports each step that it flags, under `name` and with `reason`.

    Example:
        >>> import torch
        >>> class TooSmall(Detector):
        ...     reason = "the gradient norm is below 1e-12"
        ...     def __call__(self, stats):
        ...         return stats.total_norm() < 1e-12
        >>> TooSmall()(GradStats(torch.zeros(2), group_sizes=(2,)))
        tensor(True)
    """

    reason: str = ""
    """Clause that states the finding, for reports."""

    @property
    def name(self) -> str:
        """Name in reports and checkpoints: that of the class in snake case."""
        return snake_case(type(self).__name__)

    @abstractmethod
    def __call__(self, stats: GradStats) -> Tensor:
        """Return whether the step must be skipped.

        Args:
            stats: Statistics of the gradients, such as the square sum of each tensor, shape [tensors], on the device.

        Returns:
            True to skip the step: bool, shape [], on the device of ``stats`` or on the CPU.
        """

    def commit(self, skip: Tensor) -> None:  # noqa: B027 - most detectors have no state
        """Update the state at the end of the step.

        Args:
            skip: Non-zero if the step did not happen, for any reason; shape [].
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as plain numbers and tensors for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most detectors have no state
        """Restore the state returned by `state_dict`."""


DETECTORS: Registry[Detector] = Registry("detector", Detector, group="lightning_optim.detectors")
"""Detectors by name; `lightning_optim.register` adds a user's own."""


class NonFiniteGradient(Detector):
    """Detector of a NaN or an infinity in any gradient.

    It reads what clipping has measured, so it adds no cost. Under data parallelism the reduced gradients carry a NaN of
    one rank to all, so that all ranks decide alike without further communication.

    Example:
        >>> import torch
        >>> NonFiniteGradient()(GradStats(torch.tensor([1.0, float("nan")]), group_sizes=(2,)))
        tensor(True)
    """

    reason = "a gradient is not finite"

    def __call__(self, stats: GradStats) -> Tensor:
        """Return whether any gradient is not finite, bool, shape []."""
        return ~stats.finite()


DETECTORS.add(NonFiniteGradient, "non_finite_gradient")


def detector_of(given: Any) -> Detector:
    """Return the detector that a configuration gives.

    Args:
        given: A detector, or the name of a registered one.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(given, str):
        return DETECTORS.make(given, {})
    if not isinstance(given, Detector):
        raise TypeError(
            f"Invalid detectors=[{given!r}] of DivergenceGuard: each must be an instance of "
            "lightning_optim.divergence.Detector, or the name of a registered one."
        )
    return given
