"""What callbacks share that validate, save and finish with other weights than those of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.callbacks._gathered import free_gathered
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._packages import is_lightning

_OTHER_AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")


class SwapsWeights(HubCallback):
    """A callback that moves the parameters to other weights for each validation and each checkpoint, and back.

    After the fit or an exception they stay there, so that ``trainer.test`` and ``torch.save`` use them.
    """

    def __init__(self) -> None:
        self._training = False
        self._undo: list[Callable[[], None]] = []

    def _refuse_other_averages(self, trainer: L.Trainer, instead: str) -> None:
        """Refuse callbacks of Lightning that exchange the same weights with an average of their own.

        Args:
            trainer: The Trainer, with its callbacks.
            instead: What to do for what they are used for, as a clause.

        Raises:
            MisconfigurationException: There is one.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if any(is_lightning(other, name) for name in _OTHER_AVERAGES):
                name = type(other).__name__
                raise MisconfigurationException(
                    f"{name} puts another average in the place of the same weights as {self.role}: which of the two is "
                    f"validated, saved and left at the end would depend on their order. Remove {name}, or {self.role}; "
                    f"{instead}."
                )

    @abstractmethod
    def _swap_in(self, trainer: L.Trainer) -> None:
        """Move to the weights for use; nothing happens where they are in place."""

    @abstractmethod
    def _swap_out(self, trainer: L.Trainer) -> None:
        """Move to the weights of training; nothing happens where they are in place."""

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last fit, which may have ended without any hook."""
        self._training = False

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the weights of training, because a checkpoint that was just restored contains those for use."""
        self._train(trainer)

    _at_new_optimizers = _at_train_start

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the weights for use; outside of a fit the parameters have them already."""
        self._eval(trainer)

    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move back to the weights of training."""
        self._train(trainer)

    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to the weights for use, permanently."""
        self._eval(trainer)

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Move to the weights for use, because Lightning does not call `on_train_end` after an exception."""
        if self._training:
            self._eval(trainer)

    def _at_close(self) -> None:
        """Unwrap ``trainer.save_checkpoint``."""
        while self._undo:
            self._undo.pop()()

    def _train(self, trainer: L.Trainer) -> None:
        free_gathered(trainer.lightning_module)
        self._swap_out(trainer)
        self._training = True

    def _eval(self, trainer: L.Trainer) -> None:
        free_gathered(trainer.lightning_module)
        self._swap_in(trainer)
        self._training = False

    def _wrap_save_checkpoint(self, trainer: L.Trainer) -> None:
        """Save every checkpoint with the weights for use.

        A hook would not suffice: Lightning calls `on_save_checkpoint` after the weights are collected, and not at all
        for checkpoints of weights only.
        """
        save = trainer.save_checkpoint
        wrapped_before = "save_checkpoint" in vars(trainer)

        def save_swapped(*args: Any, **kwargs: Any) -> None:
            training = self._training
            if training:
                self._eval(trainer)
            try:
                save(*args, **kwargs)
            finally:
                if training:
                    self._train(trainer)

        def undo() -> None:
            if vars(trainer).get("save_checkpoint") is not save_swapped:
                return  # Wrapped once more in the meantime: what is around ours stays, and ours only passes on by now.
            if wrapped_before:
                trainer.save_checkpoint = save  # type: ignore[method-assign]
            else:
                del trainer.save_checkpoint  # This uncovers the method of the class.

        trainer.save_checkpoint = save_swapped  # type: ignore[method-assign]
        self._undo.append(undo)
