"""Everything of Lightning that is private and relied on; a new release of Lightning breaks this file or nothing.

``tests/callbacks/test_lightning_private.py`` says what is relied on.
"""

from __future__ import annotations

from lightning.pytorch import Trainer


def logging_step(trainer: Trainer) -> int:
    """Where ``LightningModule.log`` puts the present batch on the loggers' axis.

    It is ``global_step`` with one optimizer, but advances once per batch however many optimizers step.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logging_due(trainer: Trainer) -> bool:
    """Whether ``LightningModule.log`` writes at the present batch: every ``log_every_n_steps``-th step."""
    return trainer._logger_connector.should_update_logs
