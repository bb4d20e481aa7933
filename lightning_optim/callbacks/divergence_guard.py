from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks.hub import HubCallback, plain_name
from lightning_optim.callbacks.lightning_private import logging_step
from lightning_optim.divergence import SIGNALS, Alarm, Detector, Judge, SlowDivergence, SpikeWindow, Watch
from lightning_optim.gradients import names_of

CHECKPOINT_KEY = "lightning_optim.divergence_guard"
"""Not as the callback's own state: of two callbacks that have some, Lightning says less than we do."""


@dataclass(frozen=True)
class Spikes:
    """What stands out, and whether such a step is skipped; see `lightning_optim.divergence.SpikeWindow`.

    Args:
        threshold: How many robust standard deviations above the median of the last accepted values.
        min_rise: And how much above the median, as a share of it.
        window: How many accepted values are remembered.
        warmup: Accepted steps before the first flag.
        patience: So many flags in a row are a new level, not spikes.
        skip: Whether to skip the step; otherwise it is told of only.
    """

    threshold: float = 8.0
    min_rise: float = 0.1
    window: int = 128
    warmup: int = 64
    patience: int = 16
    skip: bool = True

    def make(self) -> SpikeWindow:
        """What looks at gradient norm and loss; refuses what is out of range."""
        return SpikeWindow(len(SIGNALS), self.threshold, self.min_rise, self.window, self.warmup, self.patience)


class DivergenceGuard(HubCallback):
    """Skips an optimizer step that would harm the run, goes on with the next batch, and says what it did.

    A step is skipped if its loss or a gradient is not finite, or if loss or gradient norm stand far out from the last
    ones. Parameters, moments, step counters and the schedule stay bit for bit what they were. The decision is taken on
    the device from the reduced gradients and loss, so all ranks decide alike. It is exact for every optimizer; with
    optimizers that take the flag in their kernel (all fused ones) the host never waits. Each skip is warned about, with
    the parameters concerned, and logged as ``optim_health/skipped_steps``.

    Under 16-bit precision with a GradScaler, its overflows are skipped steps as well, but nothing to warn about.

    Args:
        spikes: What a spike is; None to skip only what is not finite.

    Raises:
        ValueError: A threshold is out of range.

    Example:
        >>> trainer = L.Trainer(callbacks=[DivergenceGuard()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, spikes: Spikes | None = Spikes()) -> None:
        self.spikes = spikes
        if spikes is not None:
            spikes.make()
        self._skipped = 0
        self._watches: list[Watch] = []
        self._judges: list[Judge] = []
        self._loss: Tensor | None = None
        self._restored: dict[str, Any] = {}
        self._names: list[dict[int, str]] = []
        self._trainer: L.Trainer | None = None
        self.alarms: list[Alarm] = []

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far, over all optimizers and resumes."""
        return self._skipped

    @property
    def overflow_steps(self) -> int:
        """Of these, overflows of the GradScaler."""
        return sum(judge.overflow_steps for judge in self._judges)

    def detectors(self) -> Sequence[Detector]:
        """A `Watch`."""
        spikes = self.spikes
        skip = SIGNALS if spikes is not None and spikes.skip else ()
        return (Watch(None if spikes is None else spikes.make(), skip, self._take_loss),)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes up where a resumed run was."""
        super().on_train_start(trainer, pl_module)
        self._trainer = trainer
        self._loss = None
        self._skipped = self._count()
        names: dict[Tensor, str] = {param: plain_name(name) for name, param in pl_module.named_parameters()}
        self._names = [_names_by_place(optimizer, names) for optimizer in trainer.optimizers]
        self._watches = [d for p in self.hub.pipelines for d in p.detectors if isinstance(d, Watch)]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._judges = [Judge(SlowDivergence(), scaled=scaled) for _ in self._watches]
        for watch, state in zip(self._watches, self._restored.get("watches", []), strict=False):
            watch.load_state_dict(state)
        for judge, state in zip(self._judges, self._restored.get("judges", []), strict=False):
            judge.load_state_dict(state)
        self._restored = {}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Adds up the loss of the micro-batches of a step, on the device."""
        loss = loss.detach().float()
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Tells of what was seen, as soon as the host knows of it."""
        super().on_train_batch_end(trainer, pl_module, *args)
        skipped_before, self._skipped = self._skipped, self._count()
        step = logging_step(trainer)
        for alarm in self._new_alarms():
            rank_zero_warn(f"Step {step} skipped: {alarm.text} ({self._skipped} skipped so far).")
        if self._skipped > skipped_before:
            for logger in trainer.loggers:
                logger.log_metrics({"optim_health/skipped_steps": float(self._skipped)}, step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves baselines and counts of all optimizers: plain numbers and tensors."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[CHECKPOINT_KEY] = self._state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps them until training starts: there are no optimizers yet."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})

    def _state(self) -> dict[str, Any]:
        if not self._watches:
            return self._restored
        return {
            "watches": [watch.state_dict() for watch in self._watches],
            "judges": [judge.state_dict() for judge in self._judges],
        }

    def _new_alarms(self) -> list[Alarm]:
        found = []
        for watch, judge, names in zip(self._watches, self._judges, self._names, strict=True):
            for seen in watch.read():
                found += judge.update(seen, names)
        self.alarms += found
        return found

    def _take_loss(self) -> Tensor | None:
        """The loss since the last optimizer step, the same on all ranks."""
        loss, self._loss = self._loss, None
        if loss is None or self._trainer is None or self._trainer.world_size == 1:
            return loss
        reduced: Tensor = self._trainer.strategy.reduce(loss, reduce_op="mean")
        return reduced

    def _count(self) -> int:
        return sum(counts.skipped for counts in self.hub.counts())


def _names_by_place(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[int, str]:
    found = [name for group in optimizer.param_groups for name in names_of(group, names)]
    return {place: name for place, name in enumerate(found) if name is not None}
