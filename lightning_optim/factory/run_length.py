"""How many optimizer steps a Lightning Trainer will take. Reads the Trainer's public attributes; imports nothing."""

from __future__ import annotations

import math
from typing import Any

from lightning_optim.core.durations import Horizon


def horizon_of(trainer: Any, fresh: bool = False) -> Horizon:
    """Compute the length of a Trainer's run; correct from ``on_train_start`` on, when its dataloaders are set up.

    Args:
        trainer: The Trainer.
        fresh: Whether to leave out what has been trained already: for a scheduler that starts at 0 in a second ``fit``
            of the same Trainer, where Lightning makes new optimizers and does not reset its count.

    Lightning's own ``estimated_stepping_batches`` is -1 for an ``IterableDataset`` with ``max_epochs``, infinite for
    ``max_time``, wrong with a ``GradientAccumulationScheduler``, and makes a resumed stateful dataloader replay batches
    when it is read in ``configure_optimizers``.
    """
    batches = trainer.num_training_batches
    known_epochs = trainer.max_epochs is not None and trainer.max_epochs != -1
    bounds = [trainer.max_steps] if trainer.max_steps not in (None, -1) else []
    steps_per_epoch = None
    if math.isfinite(batches):
        factors = [_accumulation(trainer, epoch) for epoch in range(trainer.max_epochs if known_epochs else 1)]
        # A window cut short by the end of an epoch still steps.
        epochs = [math.ceil(batches / factor) for factor in factors]
        if known_epochs:
            bounds.append(sum(epochs))
        steps_per_epoch = sum(epochs) / len(epochs) if epochs else None
    done = trainer.global_step // max(len(trainer.optimizers), 1) if fresh else 0
    return Horizon(min(bounds) - done if bounds else None, steps_per_epoch)


def _accumulation(trainer: Any, epoch: int) -> int:
    for callback in trainer.callbacks:
        # Duck-typed: lightning.pytorch.callbacks.GradientAccumulationScheduler, the one callback with this method.
        if hasattr(type(callback), "get_accumulate_grad_batches"):  # of the type: a mock has any
            return int(callback.get_accumulate_grad_batches(epoch))
    return int(trainer.accumulate_grad_batches)
