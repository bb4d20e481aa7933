"""Measurements of a fit apart from its optimizers: losses, micro-batches, time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.callbacks._lightning import data_parallel_size, logging_step, loss_scale
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.host import widest_dtype
from lightning_optim.core.stats import StepRecord
from lightning_optim.diagnostics import StepReport
from lightning_optim.diagnostics.clock import StepClock
from lightning_optim.diagnostics.local_gradient import LocalGradient
from lightning_optim.diagnostics.loss import LossHistory
from lightning_optim.diagnostics.noise_scale import NoiseScale
from lightning_optim.step.measure import measure_norm_sq


class RunMeter:
    """Measurements from one report to the next that no optimizer has. Nothing here waits for the device.

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
        self._small: dict[Tensor, Tensor] = {}
        """Square sum of each parameter's gradient of a part of the batch: of this rank's first micro-batch."""
        self._has_small = False
        """Whether it was measured for this step; ranks agree on that."""
        self._local: LocalGradient | None = None
        self._update_seconds: Callable[[], float] | None = None
        self._automatic = self._module.automatic_optimization
        # Gradients of sharded parameters are summed over ranks before those of one micro-batch can be read.
        model = trainer.strategy.model
        cut = any(hasattr(p, "device_mesh") for p in self._module.parameters())
        cut = cut or FlatShards.of(model or self._module) is not None
        self._compares = self._automatic and not cut
        self.averages = self._compares and self._accumulated == 1 and isinstance(model, DistributedDataParallel)
        """Whether ranks average what each has computed in one pass."""

    def begin_batch(self, batch: Any) -> None:
        """Count the samples of a batch."""
        if (step := logging_step(self._trainer)) != self._step:
            self._step, self._micro_batches, self._has_small = step, 0, False
        self._batch_size = samples_in(batch)
        self._samples += self._batch_size or 0

    def before_average(self) -> None:
        """Prepare to measure this rank's gradients of a reported step, before they are averaged."""
        self._local = LocalGradient(self._module.parameters())

    def after_backward(self, reported: bool) -> None:
        """Measure the gradients of the first micro-batch of a reported step: those of a smaller batch."""
        self._micro_batches += 1
        if self._local is not None:
            self._small, self._local = self._local.take(), None
            self._has_small = True
        elif reported and self._compares and self._micro_batches == 1 and self._accumulated > 1:
            grads = {p: p.grad for p in self._module.parameters() if p.grad is not None}
            if grads:
                self._small = dict(zip(grads, measure_norm_sq(list(grads.values())).unbind(), strict=True))
            self._has_small = True

    def begin_update(self) -> None:
        """Start the clock of the update."""
        self.clock.begin_update(self._device)

    def on_record(self, report: StepReport, record: StepRecord, is_first: bool) -> None:
        """Add the measurements of a step to its report; the optimizer has stepped.

        Args:
            report: The report.
            record: The record of the step.
            is_first: Whether it is the first report of the batch, which contains the values that belong to the run.
        """
        self._update_seconds = self.clock.end_update(self._device)
        if is_first and (scale := loss_scale(self._trainer)) is not None:
            report.add(("optim_health/loss_scale",), scale.clone().reshape(1), of_run=True)
        if self._has_small and (self._micro_batches > 1 or self._trainer.world_size > 1):
            self._compare(report, record)

    def _compare(self, report: StepReport, record: StepRecord) -> None:
        """Add the gradient noise scale, from the gradient of a part of the batch and that of all of it."""
        parts = [norm_sq for param, norm_sq in self._small.items() if param.grad is not None]  # what steps, no more
        parts = [part.to(self._device, widest_dtype(self._device), non_blocking=True) for part in parts]
        small_sq = torch.stack(parts).sum() if parts else torch.full((), torch.nan, device=self._device)
        small_sq = small_sq * self._accumulated**2  # Lightning has divided the loss
        if (scale := loss_scale(self._trainer)) is not None:
            small_sq = small_sq / scale.square()
        small_sq = self._reduced(small_sq, "mean")
        if not self._batch_size:
            return
        # At the end of an epoch there may be fewer micro-batches than the loss was divided by.
        large_sq = record.grad.norm_sq.sum() * (self._accumulated / self._micro_batches) ** 2
        large = self._batch_size * self._micro_batches * self._trainer.world_size
        noise_scale = self._noise.add(small_sq, large_sq, self._batch_size, large)
        report.add(("optim_grad/noise_scale",), noise_scale.reshape(1))
        report.add(("optim_grad/batch_size",), (float(large),))

    def end_batch(self, outputs: Any) -> None:
        """Add the loss of a batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._loss.add(loss.detach().reshape(()) * (self._accumulated if self._automatic else 1))

    def finish(self, report: StepReport) -> Callable[[], dict[str, float]]:
        """Add the measurements of the interval.

        Returns:
            A function for the values about speed, to be called once the report has arrived.
        """
        report.add(LossHistory.TAGS, self._loss.take(self._reduced), of_run=True)
        steps = max(report.at + 1 - self._reported_at, 1)
        seconds = self.clock.take() / steps
        samples = self._samples * data_parallel_size(self._trainer) / steps
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


def samples_in(batch: Any) -> int | None:
    """Return the number of samples in a batch; None where Lightning cannot tell it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where tensors differ it warns, and takes the first
        try:
            return int(extract_batch_size(batch))
        except (MisconfigurationException, RecursionError):
            return None
