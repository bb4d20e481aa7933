from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks.hub import HubCallback
from lightning_optim.callbacks.lightning_private import logging_step
from lightning_optim.divergence import Detector, NonFiniteGradient


class DivergenceGuard(HubCallback):
    """Skips an optimizer step whose gradients are not finite, and goes on with the next batch.

    Parameters, moments, step counters and the schedule stay bit for bit what they were. The decision is taken on the
    device from the reduced gradients, so all ranks decide alike. It is exact for every optimizer; with optimizers that
    take the flag in their kernel (all fused ones) the host never waits. Each skip is warned about and logged as
    ``optim_health/skipped_steps``.

    Under 16-bit precision with a GradScaler, its overflows are skipped steps as well.

    Example:
        >>> trainer = L.Trainer(callbacks=[DivergenceGuard()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._skipped = 0

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far, over all optimizers and resumes."""
        return self._skipped

    def detectors(self) -> Sequence[Detector]:
        """Non-finite gradients."""
        return (NonFiniteGradient(),)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up the count of a resumed run."""
        super().on_train_start(trainer, pl_module)
        self._skipped = self._count()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Tells of new skips, as soon as the host knows of them."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if (skipped := self._count()) > self._skipped:
            step = logging_step(trainer)
            rank_zero_warn(f"Step {step} skipped: its gradients are not finite ({skipped} skipped so far).")
            for logger in trainer.loggers:
                logger.log_metrics({"optim_health/skipped_steps": float(skipped)}, step)
        self._skipped = skipped

    def _count(self) -> int:
        return sum(counts.skipped for counts in self.hub.counts())
