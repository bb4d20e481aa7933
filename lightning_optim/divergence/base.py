"""Detectors: from one read of the gradients to whether this step must be skipped, on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_optim.core.stats import GradStats


class Detector(ABC):
    """Decides, without asking the host, whether the coming update may happen."""

    @abstractmethod
    def __call__(self, stats: GradStats) -> Tensor:
        """True if the step must be skipped: a bool tensor, shape [], on the device of ``stats``."""

    def commit(self, skip: Tensor) -> None:  # noqa: B027 - most remember nothing
        """Ends the step, which happened unless ``skip`` (shape [], non-zero for yes), whoever asked for that."""


class NonFiniteGradient(Detector):
    """Skips a step with a NaN or an infinity in any gradient.

    Read off what clipping has measured, so it costs nothing beside that. Under data parallelism the reduced gradients
    carry a NaN of one rank to all, so all ranks decide alike without talking.

    Example:
        >>> import torch
        >>> NonFiniteGradient()(GradStats(torch.tensor([1.0, float("nan")]), group_sizes=(2,)))
        tensor(True)
    """

    def __call__(self, stats: GradStats) -> Tensor:
        """True unless all are finite, shape []."""
        return ~stats.finite()
