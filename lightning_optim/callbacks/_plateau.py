"""When schedules that follow a metric look at it: after each validation, or at the end of each epoch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.core.suggest import nearest
from lightning_optim.schedules.plateau import Observer


class PlateauLooks:
    """Has each `Observer` of a Trainer look at its metric as often as there is a new value.

    Lightning itself looks at the end of an epoch only, which is too late where validations are counted in steps, and
    never in manual optimization. A metric that is logged in training has its value at the end of the epoch; one that
    the module logs in its own ``on_train_epoch_end``, which Lightning calls after that of callbacks, has it when the
    next epoch begins.
    """

    def __init__(self) -> None:
        self._in_training: set[int] = set()  # observers whose metric is logged in training
        self._seen: set[int] = set()
        self._late: set[int] = set()  # observers whose metric comes after the hub's turn at the end of an epoch
        self._waiting: list[Observer] = []
        self._has_validated = False

    def take_over(self, trainer: L.Trainer) -> list[Observer]:
        """Return the observers of the Trainer; Lightning no longer moves them."""
        observers = []
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Observer):
                config.scheduler.is_idle, config.strict = True, False
                config.frequency = 1 << 62  # Lightning would warn of a metric that is not there yet.
                observers.append(config.scheduler)
        return observers

    def validation_ended(self, trainer: L.Trainer) -> None:
        """Look at the metrics that the validation has given."""
        if trainer.sanity_checking:
            return
        self._has_validated = True
        metrics: dict[str, Any] = trainer.callback_metrics
        for observer in self.take_over(trainer):
            monitor = observer.scheduler.schedule.monitor
            if monitor in metrics and id(observer) not in self._in_training:
                self._seen.add(id(observer))
                observer.look(metrics[monitor])

    def epoch_ended(self, trainer: L.Trainer) -> None:
        """Look at the metrics of the training epoch, as far as they are there."""
        metrics: dict[str, Any] = trainer.callback_metrics
        for observer in self.take_over(trainer):
            monitor = observer.scheduler.schedule.monitor
            if id(observer) in self._seen:
                continue
            if monitor in metrics and id(observer) not in self._late:
                self._in_training.add(id(observer))
                observer.look(metrics[monitor])
            else:
                self._waiting.append(observer)

    def epoch_is_over(self, trainer: L.Trainer) -> None:
        """Look at the metrics that were not there yet at the hub's turn in the epoch that has ended.

        Raises:
            MisconfigurationException: A metric has not been logged, although all that log have run.
        """
        metrics: dict[str, Any] = trainer.callback_metrics
        waiting, self._waiting = self._waiting, []
        for observer in waiting:
            monitor = observer.scheduler.schedule.monitor
            if monitor in metrics:
                self._late.add(id(observer))
                self._in_training.add(id(observer))
                observer.look(metrics[monitor])
            elif self._has_validated or not trainer.enable_validation:
                raise MisconfigurationException(
                    f"{observer.scheduler.schedule!r} follows monitor={monitor!r}, and nothing logs it. "
                    f"{nearest(monitor, metrics) if metrics else 'Nothing is logged: call self.log(...) for it.'}"
                )
