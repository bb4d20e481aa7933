"""What is relied on of Lightning's private parts, for a look outside of a fit or within one.

``tests/tuning/test_inspection_lightning.py`` says what.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import (
    _process_dataloader,
    _request_dataloader,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_optim.callbacks._lightning import enter_fit
from lightning_optim.tuning.inspection.loaders import independent


def trainer_of(model: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer that a module is attached to, without the error of the public property."""
    return model._trainer


def is_fitting(trainer: L.Trainer, model: L.LightningModule) -> bool:
    """Return whether a fit of the module runs, and has placed it on its device."""
    fitting = trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
    return fitting and trainer.strategy._lightning_module is model


def enter(trainer: L.Trainer, model: L.LightningModule, datamodule: Any, loaders: Any) -> None:
    """Bring a Trainer to where ``fit`` is when it begins."""
    enter_fit(trainer, model, datamodule, loaders)


def silence(trainer: L.Trainer) -> None:
    """Give a Trainer loggers that write nothing, as ``fast_dev_run`` does."""
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]


def place(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Convert the module as the precision has it, and move it to the device, without what a strategy wraps it in."""
    converted = trainer.precision_plugin.convert_module(model)
    assert converted is model
    trainer.strategy.model = model
    model.to(trainer.strategy.root_device)


def configured_optimizers(trainer: L.Trainer, model: L.LightningModule) -> list[Optimizer]:
    """Return what ``configure_optimizers`` makes, and hand it to the Trainer."""
    strategy = trainer.strategy
    strategy.optimizers, strategy.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(model)
    return strategy.optimizers


def training_batches(trainer: L.Trainer, data: Any, count: int) -> Iterator[Any]:
    """Yield the first batches, combined as ``fit`` combines those of several loaders.

    Args:
        trainer: The Trainer.
        data: Loaders; None for those that the Trainer has.
        count: Number of batches.
    """
    combined: Any = trainer.fit_loop._combined_loader
    iterables: Any
    mode: Any
    if data is not None and not isinstance(data, L.LightningDataModule):
        iterables, mode = data, "max_size_cycle"
    elif combined is not None:
        iterables, mode = combined.iterables, combined._mode
    else:
        iterables, mode = _requested(trainer)
    copied = tree_map(independent, iterables, is_leaf=lambda each: not isinstance(each, dict | list | tuple))
    for batch, _, _ in islice(iter(CombinedLoader(copied, mode)), count):
        yield batch


def _requested(trainer: L.Trainer) -> tuple[Any, Any]:
    """The loaders that a fit would use, in the nesting they came in, and the mode in which it would combine them."""
    loader: Any = _request_dataloader(trainer.fit_loop._data_source)
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        _resolve_overfit_batches(combined, mode=RunningStage.TRAINING)
    combined.flattened = [
        _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, part) for part in combined.flattened
    ]
    return combined.iterables, combined._mode
