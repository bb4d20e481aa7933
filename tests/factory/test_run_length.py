"""`horizon_of` reads public attributes of a Trainer; a stand-in has just these. Real Trainers: test_schedule_length."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from lightning_optim.factory.run_length import horizon_of


def _trainer(batches, max_epochs=None, max_steps=-1, accumulate=1, callbacks=(), global_step=0, optimizers=1):
    return SimpleNamespace(
        num_training_batches=batches,
        max_epochs=max_epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        global_step=global_step,
        optimizers=[None] * optimizers,
        fast_dev_run=False,
        overfit_batches=0,
        limit_train_batches=1.0,
    )


class ByEpoch:
    """Changes the accumulation as GradientAccumulationScheduler does."""

    def __init__(self, table):
        self.table = table

    def get_accumulate_grad_batches(self, epoch):
        return self.table[max(start for start in self.table if start <= epoch)]


@pytest.mark.parametrize(
    ("trainer", "total", "per_epoch"),
    [
        (_trainer(16, max_epochs=2), 32, 16),
        (_trainer(16, max_epochs=2, accumulate=3), 12, 6),
        (_trainer(16, max_epochs=2, max_steps=5), 5, 16),
        (_trainer(16, max_epochs=2, max_steps=100), 32, 16),
        (_trainer(16, max_epochs=-1, max_steps=100, accumulate=4), 100, 4),
        (_trainer(16, max_epochs=-1), None, 16),
        (_trainer(16, max_epochs=None), None, 16),
        (_trainer(math.inf, max_epochs=2), None, None),
        (_trainer(math.inf, max_epochs=2, max_steps=7), 7, None),
        (_trainer(math.inf, max_epochs=-1), None, None),
        (_trainer(16, max_epochs=2, callbacks=[object(), ByEpoch({0: 4, 1: 1})]), 20, 10),
        (_trainer(5, max_epochs=3, callbacks=[ByEpoch({0: 2, 2: 5})]), 7, 7 / 3),
        (_trainer(3, max_epochs=2, accumulate=10), 2, 1),
    ],
)
def test_length_from_what_the_trainer_says(trainer, total, per_epoch):
    found = horizon_of(trainer)
    assert found.total_steps == total
    assert found.steps_per_epoch == (pytest.approx(per_epoch) if per_epoch else None)
