from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_optim.callbacks._running_statistics import describe_layers
from lightning_optim.callbacks._swapping import SwapsWeights
from lightning_optim.factory.plan_advice import is_schedule_free
from lightning_optim.schedules import Constant, Scheduler


class ScheduleFree(SwapsWeights):
    """Validate, save and finish with the averaged weights of a schedule-free optimizer.

    Such an optimizer trains at one point and is evaluated at another. This callback moves the parameters to the average
    for each validation and each checkpoint, whichever code saves it, and back for training. After the fit or an
    exception they stay at the average, so that ``trainer.test`` and ``torch.save`` use it. With `ScheduleFreeAdamW`
    moving back is exact: neither validation nor saving changes the run, and a run resumes from its checkpoints bit for
    bit. With the optimizers of the package `schedulefree` moving back has rounding errors.

    Running statistics of batch norm remain those of the training point, with a warning; after the fit,
    ``torch.optim.swa_utils.update_bn(loader, model)`` computes those of the average.

    Raises:
        MisconfigurationException: At the start of the fit, if no optimizer has `train` and `eval`, or Lightning's
            `EMAWeightAveraging` or `StochasticWeightAveraging` takes part in it.

    Example:
        >>> callbacks = [ScheduleFree()]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    role = "ScheduleFree"

    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is such an optimizer, and wrap ``trainer.save_checkpoint``."""
        self._refuse_other_averages(trainer, "a schedule-free optimizer is evaluated at an average already")
        if not self._optimizers(trainer):
            given = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise MisconfigurationException(
                f"ScheduleFree needs an optimizer with train() and eval(), such as lightning_optim.optim."
                f"ScheduleFreeAdamW; this run has {given}. Change the optimizer, or remove the callback."
            )
        if layers := describe_layers(pl_module):
            rank_zero_warn(
                f"Running statistics of batch norm ({layers}) are those of the point where Schedule-Free trains, and "
                "validation and checkpoints use them with averaged weights, for which they may be wrong. After the "
                "fit, torch.optim.swa_utils.update_bn(loader, model) computes those of the average."
            )
        self._wrap_save_checkpoint(trainer)

    @staticmethod
    def _optimizers(trainer: L.Trainer) -> list[Any]:
        modes = ("train", "eval")
        return [o for o in trainer.optimizers if all(callable(getattr(o, mode, None)) for mode in modes)]

    def _swap_in(self, trainer: L.Trainer) -> None:
        """Move to the average."""
        for optimizer in self._optimizers(trainer):
            optimizer.eval()

    def _swap_out(self, trainer: L.Trainer) -> None:
        """Move to the training point."""
        for optimizer in self._optimizers(trainer):
            optimizer.train()


def schedule_free_notes(trainer: L.Trainer, optimizers: Sequence[Optimizer]) -> list[str]:
    """Return what a Schedule-Free optimizer lacks: the callback that goes with it, and no decay of the rate.

    Args:
        trainer: The Trainer, with its callbacks and schedulers.
        optimizers: The optimizers themselves, no wrappers.
    """
    free = [optimizer for optimizer in optimizers if is_schedule_free(optimizer)]
    if not free:
        return []
    name, notes = type(free[0]).__name__, []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, ScheduleFree) for callback in callbacks):
        notes.append(
            f"{name} is evaluated at an average of its weights. Without the callback lightning_optim.ScheduleFree, "
            "validation and checkpoints have the weights of the last step. Add it."
        )
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, Scheduler) or scheduler.optimizer not in free:
            continue
        if not isinstance(scheduler.schedule, Constant):
            notes.append(
                f"{name} does without a decay of the learning rate, and {type(scheduler.schedule).__name__} lowers it "
                "as well. schedule=constant, with a warmup, is usual."
            )
    return notes
