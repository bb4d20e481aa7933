"""What a monitor sees of a fit beside its optimizers: losses, micro-batches, time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_optim.backends.shards import is_sharded
from lightning_optim.callbacks.lightning_private import logging_step, loss_scale
from lightning_optim.diagnostics import Report
from lightning_optim.diagnostics.clock import StepClock
from lightning_optim.diagnostics.loss import LossHistory
from lightning_optim.diagnostics.noise_scale import NoiseScale
from lightning_optim.measure import measure_norm_sq
from lightning_optim.stats import StepRecord


class RunMeter:
    """Measures, from one report to the next, what no optimizer knows. Nothing here waits for the device.

    Args:
        trainer: A Trainer that has begun to train.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._device = self._module.device
        self._loss = LossHistory(self._device)
        self._noise = NoiseScale(self._device)
        self.clock = StepClock()
        self._reported_at = self._step = logging_step(trainer)
        self._micro_batches = 0
        self._batch_size: int | None = None
        self._samples = 0
        self._first_norm_sq: Tensor | None = None
        self._update_seconds: Callable[[], float] | None = None
        self._automatic = self._module.automatic_optimization
        # Gradients of sharded parameters are summed over ranks before anybody sees those of one micro-batch.
        self._compares = self._automatic and not any(is_sharded(p) for p in self._module.parameters())

    def begin_batch(self, batch: Any) -> None:
        """A batch has come."""
        if logging_step(self._trainer) != self._step:
            self._step, self._micro_batches, self._first_norm_sq = logging_step(self._trainer), 0, None
        self._batch_size = _batch_size(batch)
        self._samples += self._batch_size or 0

    def after_backward(self, reported: bool) -> None:
        """Gradients have been added. The first ones of a reported step are those of a smaller batch."""
        self._micro_batches += 1
        if not (reported and self._compares and self._micro_batches == 1 and self._accumulated > 1):
            return
        grads = [p.grad for p in self._module.parameters() if p.grad is not None]
        if grads:
            total = measure_norm_sq(grads).sum() * self._accumulated**2  # Lightning has divided the loss
            scale = loss_scale(self._trainer)
            self._first_norm_sq = self._reduced(total if scale is None else total / scale.square(), "mean")

    def begin_update(self) -> None:
        """The optimizer is about to step."""
        self.clock.begin_update(self._device)

    def on_record(self, report: Report, record: StepRecord) -> None:
        """The optimizer has stepped: adds what belongs to this step."""
        self._update_seconds = self.clock.end_update(self._device)
        if (scale := loss_scale(self._trainer)) is not None:
            report.add(("optim_health/loss_scale",), scale.clone().reshape(1))
        if self._first_norm_sq is not None and self._batch_size and self._micro_batches > 1:
            # At the end of an epoch there may be fewer micro-batches than the loss was divided by.
            large_sq = record.grad.norm_sq.sum() * (self._accumulated / self._micro_batches) ** 2
            small = self._batch_size
            large = small * self._micro_batches * self._trainer.world_size
            scale = self._noise.add(self._first_norm_sq, large_sq, small, large)
            report.add(("optim_grad/noise_scale",), scale.reshape(1))
            report.add(("optim_grad/batch_size",), (float(large),))

    def end_batch(self, outputs: Any) -> None:
        """The batch is done."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._loss.add(loss.detach().reshape(()) * (self._accumulated if self._automatic else 1))

    def finish(self, report: Report) -> Callable[[], dict[str, float]]:
        """Adds what belongs to the interval; and what gives the rest, when the report has arrived."""
        report.add(LossHistory.TAGS, self._loss.take(self._reduced))
        steps = max(report.at + 1 - self._reported_at, 1)
        seconds = self.clock.take() / steps
        samples = self._samples * self._trainer.world_size / steps
        self._reported_at, self._samples = report.at + 1, 0
        update_seconds, self._update_seconds = self._update_seconds, None

        def speed() -> dict[str, float]:
            values = {"optim_speed/steps_per_second": 1 / seconds}
            if samples:
                values["optim_speed/samples_per_second"] = samples / seconds
            if update_seconds is not None:
                values["optim_speed/optimizer_share"] = update_seconds() / seconds
            return values

        return speed

    @property
    def _accumulated(self) -> int:
        return self._trainer.accumulate_grad_batches if self._automatic else 1

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        """Over all ranks, which report at the same steps."""
        reduced: Tensor = self._trainer.strategy.reduce(values, reduce_op=how)
        return reduced


def _batch_size(batch: Any) -> int | None:
    """Number of samples, where Lightning can tell it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where tensors differ it warns, and takes the first
        try:
            return int(extract_batch_size(batch))
        except (MisconfigurationException, RecursionError):
            return None
