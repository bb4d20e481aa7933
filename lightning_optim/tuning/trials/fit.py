"""Trials inside a fit: short runs from the present point, each of which leaves everything as it was."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._contributor import Hears
from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._guard.step_loss import StepLoss
from lightning_optim.callbacks._hub import Hub
from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.callbacks._pipelines import has_engine
from lightning_optim.factory.run_length import horizon_of
from lightning_optim.tuning.trials.objects import ObjectSnapshot
from lightning_optim.tuning.trials.private import begin_epoch, check_loaders, fetcher_of, reseed, train_batch
from lightning_optim.tuning.trials.rates import Peaks
from lightning_optim.tuning.trials.still import still_in_place_of

SHOWING = (
    *("Checkpoint", "EarlyStopping", "ProgressBar", "LearningRateMonitor", "DeviceStatsMonitor", "Timer"),
    *(
        "ModelSummary",
        "LearningRateFinder",
        "BatchSizeFinder",
        "OnExceptionCheckpoint",
        "ThroughputMonitor",
        "SaveConfigCallback",
    ),
)
"""Lightning's callbacks that show, save or end a run, and change nothing in a step."""

_BARREN = 1000
"""Batches in a row without a step of the optimizer, after which a trial gives up; for each batch of accumulation."""

_LOST = 3
"""Losses in a row that are not finite, after which a trial ends."""

Stop = Callable[[Sequence[float]], bool]
"""Decides from the losses so far that there is nothing more to learn."""

Prepare = Callable[[Optimizer], None]
"""Sets something in an optimizer before the first step of a trial."""


@dataclass(frozen=True)
class Trial:
    """A trial that has been run.

    Args:
        losses: The loss of each step, mean over its micro-batches and ranks, before its update.
        rates: The base rate of each step.
        ended: ``"finished"``, ``"stopped"`` by its losses, or ``"failed"``.
        error: The exception, if it failed.
        seconds: How long it took.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    ended: str = "finished"
    error: BaseException | None = None
    seconds: float = 0.0


class FitTrials:
    """Runs trials from the present point of a fit, under its real configuration.

    A trial has the fit's module, optimizers, groups, precision, accumulation, clipping and data, from their
    beginning, and steps are skipped whose gradients are not finite. Schedules stand still, loggers see nothing, and
    callbacks that show, save or end a run are left out, as are alarms and responses of a guard. After it everything is
    put back (`ObjectSnapshot`), so that the fit that follows is the one without it.

    Args:
        trainer: The Trainer, in a fit, in a hook of a batch: all optimizers exist.
        without: Names of further classes of callbacks to leave out, for instance one that uploads.

    Raises:
        MisconfigurationException: The strategy steps by an engine of its own, or the data can be read only once.
    """

    def __init__(self, trainer: L.Trainer, without: Collection[str] = ()) -> None:
        if has_engine(trainer):
            raise MisconfigurationException(
                f"Trials need optimizers whose state can be put back, and {type(trainer.strategy).__name__} keeps it "
                "in an engine of its own. Find the rate with another strategy, on the same batch size."
            )
        check_loaders(trainer)
        self._trainer = trainer
        self._without = frozenset(without)
        self.optimizers: list[Optimizer] = [bare(optimizer) for optimizer in trainer.optimizers]
        schedulers = {id(getattr(c.scheduler, "optimizer", None)): c.scheduler for c in trainer.lr_scheduler_configs}
        horizon = horizon_of(trainer)
        self.peaks = [Peaks(optimizer, schedulers.get(id(optimizer)), horizon) for optimizer in self.optimizers]
        self._snapshot = ObjectSnapshot(trainer, trainer.lightning_module, leave=trainer.loggers)

    def sweep(self, place: int, rates: Sequence[float], stop: Stop | None = None, seed: int = 0) -> Trial:
        """Run one step at each of these rates, one after the other.

        Args:
            place: Which optimizer; the others have their peak rates after a short warmup.
            rates: Base rates, one for each step; all groups keep their ratios.
            stop: Ends it early.
            seed: Seed of another order of the data, and of all other random numbers; 0 for those of the fit.

        Returns:
            The trial.
        """
        base = self.peaks[place].base
        factors = [rate / base for rate in rates]
        return self._run(place, len(rates), lambda step: [factors[step]] * self._groups(place), rates, stop, seed=seed)

    def at(
        self,
        place: int,
        rate: float,
        steps: int,
        stop: Stop | None = None,
        prepare: Prepare | None = None,
        accumulate: int = 1,
    ) -> Trial:
        """Run steps at one peak rate, under the shape that the schedule has over the whole run, scaled to the trial.

        Args:
            place: Which optimizer; the others have their configured peaks.
            rate: The base rate at the peak.
            steps: Number of optimizer steps.
            stop: Ends it early.
            prepare: Called with the optimizer before the first step, to try another value of something else.
            accumulate: How many times as many batches to accumulate as the fit does, for a larger batch.

        Returns:
            The trial.
        """
        peaks = self.peaks[place]
        factor, curves = rate / peaks.base, peaks.curves(steps)

        def set_up(optimizer: Optimizer) -> None:
            self._trainer.accumulate_grad_batches *= accumulate
            peaks.scale(factor)
            if prepare is not None:
                prepare(optimizer)

        return self._run(place, steps, lambda step: [factor * c(step) for c in curves], [rate] * steps, stop, set_up)

    def _groups(self, place: int) -> int:
        return len(self.optimizers[place].param_groups)

    def _run(
        self,
        place: int,
        steps: int,
        factors: Callable[[int], Sequence[float]],
        rates: Sequence[float],
        stop: Stop | None,
        prepare: Prepare | None = None,
        seed: int = 0,
    ) -> Trial:
        began, error, ended = time.monotonic(), None, "finished"
        steering = _Steering(self.peaks, place, steps, factors)
        try:
            with self._prepared(steering), fetcher_of(self._trainer) as fetcher:
                if prepare is not None:
                    prepare(self.optimizers[place])
                if seed:
                    reseed(fetcher, seed, self._trainer.global_rank)
                for losses in self._steps(fetcher, steering, steps):
                    if _is_lost(losses) or (stop is not None and stop(losses)):
                        ended = "stopped"
                        break
        except Exception as raised:  # Of the user's module, or of memory: the next trial may do without.
            ended, error = "failed", raised
        finally:
            self._snapshot.put_back()
        losses = steering.losses
        return Trial(losses, list(rates[: len(losses)]), ended, error, time.monotonic() - began)

    def _steps(self, fetcher: Any, steering: _Steering, steps: int) -> Iterator[list[float]]:
        """Train, and yield the losses whenever there is one more."""
        trainer = self._trainer
        barren, limit = 0, _BARREN * max(trainer.accumulate_grad_batches, 1)
        goes_on = False
        while len(steering.losses) < steps:
            if not goes_on:
                begin_epoch(trainer, fetcher)
            before = len(steering.losses)
            goes_on = train_batch(trainer, fetcher)
            if len(steering.losses) > before:
                barren = 0
                yield steering.losses
                continue
            barren += 1
            if barren > limit:
                name = type(self.optimizers[steering.place]).__name__
                raise RuntimeError(f"No step of {name} in {barren} batches, so that there is no loss to compare.")

    @contextmanager
    def _prepared(self, steering: _Steering) -> Iterator[None]:
        """Have the Trainer run steps, and nothing beside them; what is set here `ObjectSnapshot` puts back."""
        trainer: Any = self._trainer
        hub = next((callback for callback in trainer.callbacks if type(callback) is Hub), None)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # They are shown when the run begins.
            if hub is not None:
                stack.enter_context(hub.steps_alone())
            trainer.callbacks = [steering, *(each for each in trainer.callbacks if not self._is_left_out(each))]
            if trainer.loggers:
                trainer.loggers = [DummyLogger()]
            trainer.profiler = PassThroughProfiler()
            trainer.strategy.lr_scheduler_configs = still_in_place_of(trainer.lr_scheduler_configs, self.optimizers)
            steering.start(trainer)
            yield

    def _is_left_out(self, callback: Any) -> bool:
        return is_showing(callback) or not self._without.isdisjoint(cls.__name__ for cls in type(callback).__mro__)


def is_showing(callback: Any) -> bool:
    """Return whether a callback shows, saves or ends a run, or looks for rates itself: trials do without it.

    Args:
        callback: A callback of Lightning, of ours or of the user's.
    """
    if getattr(type(callback), "finds_rates", False):
        return True
    return any(is_lightning(callback, name) for name in SHOWING)


def _is_lost(losses: Sequence[float]) -> bool:
    """Whether the last losses are not finite; a single one may be the batch's."""
    return len(losses) >= _LOST and not any(math.isfinite(loss) for loss in losses[-_LOST:])


class _Steering(Hears):
    """Sets the rates before each batch, and takes the loss of each step."""

    def __init__(
        self, peaks: Sequence[Peaks], place: int, steps: int, factors: Callable[[int], Sequence[float]]
    ) -> None:
        self.place, self.losses = place, list[float]()
        self._peaks, self._steps, self._factors = peaks, steps, factors
        self._others = [None if i == place else each.curves(steps) for i, each in enumerate(peaks)]
        self._counts = [0] * len(peaks)
        self._loss = StepLoss()

    def start(self, trainer: L.Trainer) -> None:
        """Begin."""
        self._loss.start(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rates of the steps of this batch."""
        for peaks, others, count in zip(self._peaks, self._others, self._counts, strict=True):
            step = min(count, self._steps - 1)
            peaks.set_rates(self._factors(step) if others is None else [curve(step) for curve in others])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the loss of a micro-batch."""
        self._loss.add(trainer, loss)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Count the step, and note its loss."""
        place = next(i for i, each in enumerate(self._peaks) if each.optimizer is bare(optimizer))
        self._counts[place] += 1
        loss = self._loss.take()
        if place != self.place:
            return
        if loss is None:
            raise ValueError(
                f"No loss is known of the step of {type(bare(optimizer)).__name__}: in manual optimization call "
                "`self.manual_backward(loss)` in place of `loss.backward()`."
            )
        self.losses.append(float(loss))
