"""Detectors: from one read of the gradients to whether this step must be skipped, on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optim.core.registry import Registry, snake_case
from lightning_optim.core.stats import GradStats


class Detector(ABC):
    """A decision, without asking the host, whether the coming update may happen.

    To add one, subclass, define `__call__`, and hand it to ``DivergenceGuard(detectors=[...])``, or to
    `StepPipeline` in a plain loop. The guard reports each step that it flags, under `name` and with `reason`.

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
    """A clause that says what it has found, for reports."""

    @property
    def name(self) -> str:
        """Its name in reports and checkpoints: that of its class in lower case with underscores."""
        return snake_case(type(self).__name__)

    @abstractmethod
    def __call__(self, stats: GradStats) -> Tensor:
        """Return whether the step must be skipped.

        Args:
            stats: One read of the gradients: square sum of each tensor, shape [tensors], on the device.

        Returns:
            True if so: a bool tensor, shape []; on the device of ``stats``, or on the CPU.
        """

    def commit(self, skip: Tensor) -> None:  # noqa: B027 - most remember nothing
        """End the step.

        Args:
            skip: Non-zero if the step did not happen, for any reason; shape [].
        """

    def state_dict(self) -> dict[str, Any]:
        """Return its state, as plain numbers and tensors for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most remember nothing
        """Restore the state returned by `state_dict`."""


DETECTORS: Registry[Detector] = Registry("detector", Detector)
"""Detectors by name; `lightning_optim.register` adds a user's own."""


class NonFiniteGradient(Detector):
    """Skip a step with a NaN or an infinity in any gradient.

    It reads what clipping has measured, so it costs nothing in addition. Under data parallelism the reduced gradients
    carry a NaN of one rank to all, so all ranks decide alike without talking.

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
