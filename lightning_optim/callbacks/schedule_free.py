from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.callbacks._hub import HubCallback


class ScheduleFree(HubCallback):
    """Validate, save and finish with the averaged weights of a schedule-free optimizer.

    Such an optimizer trains at one point and is evaluated at another. This callback moves the parameters to the average
    for each validation and each checkpoint, whichever code saves it, and back for training. After the fit or an
    exception they stay at the average, so that ``trainer.test`` and ``torch.save`` use it. With `ScheduleFreeAdamW`
    moving back is exact: neither validation nor saving changes the run, and a run resumes from its checkpoints bit for
    bit. With the optimizers of the package `schedulefree` moving back has rounding errors.

    Running statistics of batch norm remain those of the training point; recompute them before evaluation.

    Raises:
        MisconfigurationException: At the start of the fit, if no optimizer has `train` and `eval`.

    Example:
        >>> callbacks = [ScheduleFree()]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    role = "ScheduleFree"

    def __init__(self) -> None:
        self._training = False
        self._undo: list[Callable[[], None]] = []

    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is such an optimizer, and wrap ``trainer.save_checkpoint``."""
        if not self._optimizers(trainer):
            given = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise MisconfigurationException(
                f"ScheduleFree needs an optimizer with train() and eval(), such as lightning_optim.optim."
                f"ScheduleFreeAdamW; this run has {given}. Change the optimizer, or remove the callback."
            )
        self._wrap_save_checkpoint(trainer)

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the training point, because a checkpoint that was just restored contains the average."""
        self._train(trainer)

    _at_new_optimizers = _at_train_start

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the average; outside of a fit the parameters are at the average already."""
        self._eval(trainer)

    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move back to the training point."""
        self._train(trainer)

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the average, permanently."""
        self._eval(trainer)

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Move to the average, because Lightning does not call `on_train_end` after an exception."""
        self._eval(trainer)

    def _at_close(self) -> None:
        """Unwrap ``trainer.save_checkpoint``."""
        while self._undo:
            self._undo.pop()()

    @staticmethod
    def _optimizers(trainer: L.Trainer) -> list[Any]:
        modes = ("train", "eval")
        return [o for o in trainer.optimizers if all(callable(getattr(o, mode, None)) for mode in modes)]

    def _train(self, trainer: L.Trainer) -> None:
        for optimizer in self._optimizers(trainer):
            optimizer.train()
        self._training = True

    def _eval(self, trainer: L.Trainer) -> None:
        for optimizer in self._optimizers(trainer):
            optimizer.eval()
        self._training = False

    def _wrap_save_checkpoint(self, trainer: L.Trainer) -> None:
        """Save every checkpoint from the average.

        A hook would not suffice: Lightning calls `on_save_checkpoint` after the weights are collected, and not at all
        for checkpoints of weights only.
        """
        save = trainer.save_checkpoint
        wrapped_before = "save_checkpoint" in vars(trainer)

        def save_average(*args: Any, **kwargs: Any) -> None:
            training = self._training
            if training:
                self._eval(trainer)
            try:
                save(*args, **kwargs)
            finally:
                if training:
                    self._train(trainer)

        def undo() -> None:
            if wrapped_before:
                trainer.save_checkpoint = save  # type: ignore[method-assign]
            else:
                del trainer.save_checkpoint  # This uncovers the method of the class.

        trainer.save_checkpoint = save_average  # type: ignore[method-assign]
        self._undo.append(undo)
