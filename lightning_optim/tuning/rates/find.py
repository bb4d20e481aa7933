"""`find_lr`: the learning rate of a run that has not begun."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_optim.callbacks._hub import keep_last_fit
from lightning_optim.tuning.rates.found import FoundRates
from lightning_optim.tuning.rates.range_test import LRRangeTest
from lightning_optim.tuning.trials.left_out import class_names, is_showing
from lightning_optim.tuning.trials.objects import ObjectSnapshot


def find_lr(
    trainer: L.Trainer,
    model: L.LightningModule,
    train_dataloaders: Any = None,
    datamodule: L.LightningDataModule | None = None,
    *,
    method: str = "trials",
    steps: int | None = None,
    repeats: int = 2,
    low: float | None = None,
    high: float | None = None,
    weight_decays: Sequence[float] = (),
    batches: Sequence[int] = (),
    ckpt_path: str | None = None,
    without: Collection[str] = (),
) -> FoundRates:
    """Find the learning rate of each optimizer of a run, by short trials under its real configuration.

    The fit is begun as ``trainer.fit`` would, without loggers, checkpoints and validation, and ends with the trials.
    Afterwards Trainer, module, data and random numbers are as they were, bit for bit, so that the same objects can be
    fitted. `LRRangeTest` does the same inside a fit, and sets what it finds.

    Args:
        trainer: A Trainer that is not in a fit.
        model: The module.
        train_dataloaders: The data as ``fit`` takes them; None if the module has its own.
        datamodule: A data module.
        method: ``"trials"``, the most reliable one, ``"sweep"`` or ``"check"``; see `LRRangeTest`.
        steps: Steps of a trial of the last round, by default 100, or of a sweep, by default 200.
        repeats: Number of sweeps of each optimizer.
        low: Lowest rate to try; by default well below what is usual for the optimizer.
        high: Highest rate to try; by default well above it.
        weight_decays: Values of weight decay to try, each with the rate that is found, half of it and twice as much.
        batches: Multiples of the batch to try, by accumulation, each with the rate that is found and with those of the
            square root and the linear scaling rule.
        ckpt_path: A checkpoint from which the run will go on; None for a run from its start.
        without: Names of classes of callbacks to leave out of the trials.

    Returns:
        A rate for each optimizer, with an interval, or the reason why the losses do not tell.

    Raises:
        MisconfigurationException: The fit would take no step.
        RuntimeError: Not a single trial went through; its cause is what the last one raised.
        ValueError: An argument is out of its range.

    Example:
        ```python
        found = lo.find_lr(trainer, model, loader)
        print(found)
        # AdamW: lr 0.0021, between 0.00093 and 0.0046 (configured: 0.001). ...
        ```
    """
    finder = LRRangeTest(method, steps, repeats, low, high, apply=False, without=without)
    finder._draws = trainer.progress_bar_callback is not None
    finder._leaves, finder._weight_decays, finder._batches = True, weight_decays, batches
    own: Any = trainer
    snapshot = ObjectSnapshot(trainer, model, train_dataloaders, datamodule, leave=[*trainer.loggers, finder])
    showing = [each for each in own.callbacks if is_showing(each)]
    finder.without = tuple(name for name in finder.without if not any(name in class_names(each) for each in showing))
    with keep_last_fit(trainer), snapshot:
        own.callbacks = [*(each for each in own.callbacks if not is_showing(each)), finder]
        own.loggers = [DummyLogger()] if trainer.loggers else []
        own.num_sanity_val_steps = 0
        trainer.fit(model, train_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    if finder.found is None:
        raise MisconfigurationException(
            f"The fit took no step, so there is nothing to find: max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, {trainer.current_epoch} epochs done. Give find_lr the Trainer of a run "
            "that has steps to come."
        )
    return finder.found
