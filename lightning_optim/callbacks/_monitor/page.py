"""What `OptimizerMonitor` writes to TensorBoard in addition to scalars."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_optim.callbacks._boards import Boards, boards_of
from lightning_optim.callbacks._followed import bare, names_in, prefixes_in
from lightning_optim.callbacks._lightning import logging_step
from lightning_optim.callbacks._monitor.hyperparameters import Hyperparameters
from lightning_optim.callbacks._monitor.schedule_image import schedule_image
from lightning_optim.callbacks._monitor.settings import settings
from lightning_optim.callbacks._packages import lightning_class, tensorboard_loggers
from lightning_optim.core.sizes import format_bytes
from lightning_optim.diagnostics import tensorboard
from lightning_optim.factory.about import about
from lightning_optim.factory.plan import plan_groups
from lightning_optim.schedules import Scheduler

HP_METRICS = ("optim_loss/mean",)
REDRAW_SECONDS, REDRAW_SHARE = 60.0, 1 / 20
"""Least time and least share of the run between two images of the schedule; drawing one takes 0.2 to 0.5 s."""


class MonitorPage:
    """Groups, configuration, schedule, alarms, hyperparameters and the screen of charts, in each TensorBoardLogger.

    Args:
        trainer: The Trainer, on the rank that logs.
        metrics: Tags by which runs are compared on the page of hyperparameters.
    """

    def __init__(self, trainer: L.Trainer, metrics: Sequence[str] = HP_METRICS) -> None:
        self._trainer = trainer
        self._hyperparameters = Hyperparameters(trainer, metrics)
        self._tags: set[str] = set()
        self._drawn = (0, 0.0)
        self._awaits_state = self._has_started = False
        loggers = tensorboard_loggers(trainer) if trainer.is_global_zero else []
        self._writers = [logger.experiment for logger in loggers]
        self._boards = Boards(boards_of(trainer))

    @property
    def has_started(self) -> bool:
        """Whether `start` has been called."""
        return self._has_started

    def start(self, batch_size: int | None = None) -> None:
        """Write what is known before the first step; purge what a run wrote after the step that it is resumed at.

        To be called in the first batch: only then has Lightning corrected the step of a checkpoint that was saved
        within an epoch, and the point before it stays.

        Args:
            batch_size: Number of samples of the first batch; None if it is not known.
        """
        self._has_started = True
        step = logging_step(self._trainer)
        for writer in self._writers:
            if step > 0:
                tensorboard.purge_from(writer, step)
        self.show_groups()
        found = settings(self._trainer, batch_size)
        self._hyperparameters.log(found)
        for writer in self._writers:
            writer.add_text(
                "optim/configuration", tensorboard.markdown_table(["setting", "value"], found.items()), step
            )
        self.show_schedule()

    def show_groups(self) -> None:
        """Write the groups of all optimizers; again after the first report, if only the state itself shows its size.

        No optimizer is created to find it out: that of a user may draw random numbers, count its instances, or need
        what it gets later.
        """
        if not self._boards:
            return
        header = ["group", "tensors", "parameters", "lr", "weight decay", "rule", "state"]
        rows: list[list[Any]] = []
        self._awaits_state = False
        optimizers = [bare(optimizer) for optimizer in self._trainer.optimizers]
        params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
        if any(isinstance(param, UninitializedParameter) for param in params):
            self._awaits_state = True  # Lazy layers get their shapes from the first batch.
            return
        for prefix, optimizer in zip(prefixes_in(self._trainer), optimizers, strict=True):
            for group, plan in zip(optimizer.param_groups, plan_groups(optimizer), strict=True):
                size = plan.state_bytes if not optimizer.state else _bytes_kept(optimizer, group)
                self._awaits_state |= size is None
                shown = "after the first step" if size is None else format_bytes(size)
                numbers = [f"{plan.numel:,}", f"{plan.lr:.4g}", plan.weight_decay]
                rows.append([prefix + plan.name, len(plan.parameters), *numbers, plan.rule, shown])
        self._boards.table("optim/groups", header, rows, logging_step(self._trainer))

    def show_schedule(self) -> None:
        """Draw the schedule and the position of the run in it; nothing without matplotlib."""
        self._drawn = (logging_step(self._trainer), time.monotonic())
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        names = names_in(self._trainer)
        for scheduler in schedulers:
            if isinstance(scheduler, Scheduler) and scheduler.horizon is not None and self._boards:
                step = logging_step(self._trainer)
                image = schedule_image(scheduler, scheduler.horizon, step)
                tag = "optim/schedule"
                if len(names) > 1 and (name := about(bare(scheduler.optimizer)).name) is not None:
                    tag = f"{tag}/{name}"
                if image is not None:
                    self._boards.image(tag, image, step)

    def report(self, values: Mapping[str, float], step: int, alarms: Sequence[str]) -> None:
        """Write the screen of all charts so far, and new alarms, once a report has been written.

        Args:
            values: The scalars of the report, by tag.
            step: Its place on the loggers' axis.
            alarms: Sentences.
        """
        if self._awaits_state:
            self.show_groups()
            self._awaits_state = False  # an optimizer that has stepped and kept nothing keeps nothing
        if self._is_time_to_draw(step):
            self.show_schedule()
        self.show_charts(values)  # some quantities need a past
        for alarm in alarms:
            self._boards.text("optim/alarms", alarm, step, is_alarm=True)

    def show_charts(self, tags: Iterable[str]) -> None:
        """Write the screen of charts again if there are new tags."""
        new = set(tags) - self._tags
        self._tags |= new
        for writer in self._writers if new else ():
            writer.add_custom_scalars(tensorboard.screen(self._tags))

    def advise(self, advice: str, step: int) -> None:
        """Write a sentence of advice."""
        self._boards.text("optim/advice", advice, step)

    def _is_time_to_draw(self, step: int) -> bool:
        last, when = self._drawn
        if time.monotonic() - when < REDRAW_SECONDS:
            return False
        horizons = [getattr(config.scheduler, "horizon", None) for config in self._trainer.lr_scheduler_configs]
        lengths = [horizon.total_steps for horizon in horizons if horizon is not None]
        return any(length is not None and step - last >= length * REDRAW_SHARE for length in lengths)

    def end(self) -> None:
        """Write the schedule as far as it went, and the end of the session."""
        self.show_schedule()
        self._hyperparameters.end()
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Release what is held until training begins."""
        self._hyperparameters.close()


@rank_zero_only
def log_scalars(logger: Any, values: dict[str, float], step: int) -> None:
    """Log scalars as ``logger.log_metrics`` does, in one record where that is TensorBoard's own.

    Args:
        logger: The logger.
        values: The scalars, by tag.
        step: Their place on the loggers' axis.
    """
    cls: Any = lightning_class(logger, "TensorBoardLogger")
    if cls is not None and type(logger).log_metrics is cls.log_metrics and not logger._prefix:
        tensorboard.add_scalars(logger.experiment, values, step)
    else:
        logger.log_metrics(values, step)


def _bytes_kept(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    values = [value for param in group["params"] for value in optimizer.state.get(param, {}).values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
