"""The loss of a step, added up over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_optim.divergence.observation import single_value


class StepLoss:
    """The loss of the coming optimizer step: the sum over its micro-batches, on the device, equal on all ranks."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._is_complete = False
        self._reduce: Callable[..., Tensor] | None = None

    def start(self, trainer: L.Trainer) -> None:
        """Start a fit.

        Args:
            trainer: The Trainer.
        """
        self.close()
        self._reduce = trainer.strategy.reduce if trainer.world_size > 1 else None

    def add(self, trainer: L.Trainer, loss: Tensor) -> None:
        """Add the loss of a micro-batch, before its backward pass.

        Args:
            trainer: The Trainer, whose GradScaler may have scaled it.
            loss: The loss, any shape and dtype.
        """
        loss = single_value(loss)
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        if self._is_complete:  # A GradScaler left the step out, and its gradients were dropped unseen.
            self._sum, self._is_complete = None, False
        self._sum = loss if self._sum is None else self._sum + loss

    def complete(self) -> None:
        """Mark the losses so far as those of a step that has been announced."""
        self._is_complete = True

    def take(self) -> Tensor | None:
        """Return the loss since the last optimizer step, the same on all ranks, and forget it.

        Returns:
            Shape [], at least float32; None if no loss is known.
        """
        loss, self._sum, self._is_complete = self._sum, None, False
        if loss is None or self._reduce is None:
            return loss
        return self._reduce(loss, reduce_op="mean")

    def close(self) -> None:
        """Forget the fit."""
        self._sum, self._is_complete, self._reduce = None, False, None
