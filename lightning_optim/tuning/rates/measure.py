"""A sweep or trials for every optimizer of a fit, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as L
import numpy as np
from torch.optim import Optimizer

from lightning_optim.callbacks import ConfigureOptimizers
from lightning_optim.factory.about import optimizer_names
from lightning_optim.factory.plan_advice import usual_lr
from lightning_optim.factory.run_length import horizon_of
from lightning_optim.tuning.rates.check import check_rate
from lightning_optim.tuning.rates.found import FoundRate, FoundRates
from lightning_optim.tuning.rates.grids import try_batches, try_weight_decays
from lightning_optim.tuning.rates.rate_trials import RateTrials, around, try_rates
from lightning_optim.tuning.rates.suggestion import Suggestion, suggest
from lightning_optim.tuning.rates.sweep import exponential, until_divergence
from lightning_optim.tuning.trials.fit import FitTrials, Trial

METHODS = {"sweep": 200, "trials": 100, "check": 100}
"""Each method, and the default steps of a sweep or of a trial of the last round; docs/benchmarks.md compares them."""

_EXTENSIONS = 2
"""How often a sweep is repeated over other rates, where the losses say that the best is beyond."""

_OPPONENTS = (
    "Each rate is judged by the loss of its own optimizer's steps, while the others train at theirs. Where they are "
    "opponents, as in a GAN, a lower loss is not a better model."
)

_NOTHING = np.empty(0), np.empty(0), np.empty(0)

Progress = Callable[[str], object]
"""Is told of each trial that begins."""


class NoTrialError(RuntimeError):
    """Not a single trial went through; its cause is what the last one raised."""


@dataclass(frozen=True)
class Search:
    """How to look for a rate.

    Args:
        method: ``"sweep"``, ``"trials"`` or ``"check"``.
        steps: Steps of a sweep, or of a trial of the last round.
        repeats: Sweeps, each on data in another order.
        low: Lowest rate; None for one by the optimizer.
        high: Highest rate.
        weight_decays: Values of weight decay to try with the rate that is found.
        batches: Multiples of the batch to try with it.
    """

    method: str
    steps: int
    repeats: int
    low: float | None = None
    high: float | None = None
    weight_decays: Sequence[float] = ()
    batches: Sequence[int] = ()


def measure(trials: FitTrials, trainer: L.Trainer, search: Search, progress: Progress) -> FoundRates:
    """Find a rate for each optimizer.

    Args:
        trials: Trials from the present point.
        trainer: The Trainer.
        search: How to look for them.
        progress: Is told of each trial that begins.

    Returns:
        What has been found.

    Raises:
        NoTrialError: Not a single trial went through.
    """
    names, total = optimizer_names(trials.optimizers), horizon_of(trainer).total_steps
    if len(names) == 1:
        names = [type(trials.optimizers[0]).__name__]
    found, done = [], list[Trial]()
    for place, name in enumerate(names):
        one = _One(trials, place, search, total, partial(_named, progress, name))
        began = time.monotonic()
        evidence = one.find()
        _check(one.done, name)
        grids = []
        lr = one.configured if evidence.lr is None else evidence.lr
        if search.weight_decays:
            progress(f"{name}: weight decay")
            grids.append(try_weight_decays(trials, place, search.weight_decays, lr, search.steps))
        if search.batches:
            progress(f"{name}: batch")
            grids.append(try_batches(trials, place, search.batches, lr, search.steps))
        flag = _flag(trainer, place, one.configured)
        found.append(FoundRate(name, one.configured, evidence, time.monotonic() - began, flag, tuple(grids)))
        done += one.done
    notes = (*_notes(done, trials.others_set_rates), *([_OPPONENTS] if len(found) > 1 else []))
    return FoundRates(tuple(found), search.method, notes)


def _named(progress: Progress, name: str, what: str) -> None:
    progress(f"{name}: {what}")


class _One:
    """Finds the rate of one optimizer, and keeps its trials."""

    def __init__(self, trials: FitTrials, place: int, search: Search, total: int | None, progress: Progress) -> None:
        self._trials, self._place, self._search, self._total = trials, place, search, total
        self._progress = progress
        self._optimizer = trials.optimizers[place]
        self.configured = trials.peaks[place].base
        self.done: list[Trial] = []

    def find(self) -> Suggestion | RateTrials:
        """Return what the losses tell."""
        search, of_run = self._search, {"total_steps": self._total, "optimizer": type(self._optimizer)}
        if search.method == "check":
            return check_rate(self._run, self.configured, search.steps)
        low, high = _range(self._optimizer, self.configured, search)
        if search.method == "trials":
            return try_rates(self._run, low, high, search.steps, **of_run)  # type: ignore[arg-type]
        first, beyond = self._sweep(low, high, of_run)
        evidence = first
        for _ in range(_EXTENSIONS):
            if beyond is None:
                break
            evidence, beyond = self._sweep(*beyond, of_run)
        return first if evidence.lr is None else evidence

    def _run(self, rate: float, steps: int) -> list[float]:
        self._progress(f"{steps} steps at {rate:.3g}")
        trial = self._trials.at(self._place, rate, steps, until_divergence())
        self.done.append(trial)
        return list(trial.losses) if trial.ended == "finished" else []

    def _sweep(self, low: float, high: float, of_run: dict[str, Any]) -> tuple[Suggestion, tuple[float, float] | None]:
        """Sweep once in each order of the data; return what that tells, and the range that it points to."""
        search, sweeps = self._search, list[Trial]()
        rates = exponential(low, high, search.steps)
        for repeat in range(search.repeats):
            self._progress(f"sweep {repeat + 1} of {search.repeats}, {low:.2g} to {high:.2g}")
            sweeps.append(self._trials.sweep(self._place, rates, until_divergence(), seed=repeat))
        self.done += sweeps
        losses = _unlike(sweeps)
        if not losses:
            return Suggestion(None, None, None, "every sweep failed", *_NOTHING), None
        found = suggest(rates, losses, **of_run)
        return found, _beyond(found, rates, search)


def _range(optimizer: Optimizer, configured: float, search: Search) -> tuple[float, float]:
    """The rates to look at, where nobody says."""
    low, high = around(usual_lr(optimizer), configured)
    if search.method == "sweep":
        # A decade is enough of a plateau to see a descent from; steps on it are lost to where the loss is least.
        low, high = low / 10, high * 100
    return low if search.low is None else search.low, high if search.high is None else search.high


def _beyond(found: Suggestion, rates: Sequence[float], search: Search) -> tuple[float, float] | None:
    """The range in which the best rate is, if the sweep shows that it is not in its own; None if it does not."""
    curve = found.smoothed
    if found.lr is not None or len(curve) == 0 or not np.isfinite(curve).all():
        return None
    place = int(np.argmin(curve))
    if len(curve) == len(rates) and place > 0.9 * len(rates) and search.high is None:
        return rates[place // 2], rates[-1] * 100
    if place < 0.1 * len(rates) and curve[0] - curve.min() < 0.1 * (curve.max() - curve.min()) and search.low is None:
        return rates[0] / 1000, rates[min(len(curve) - 1, len(rates) // 4)]
    return None


def _unlike(done: Sequence[Trial]) -> list[list[float]]:
    """The losses of each sweep; those of another one once only, as where the data have one order."""
    found: list[list[float]] = []
    for trial in done:
        if trial.losses and trial.losses not in found:
            found.append(trial.losses)
    return found


def _check(done: Sequence[Trial], name: str) -> None:
    """Raise what every trial has raised."""
    if all(trial.ended == "failed" for trial in done):
        error = done[-1].error
        raise NoTrialError(f"No trial of {name} went through: {type(error).__name__}: {error}") from error


def _notes(done: Sequence[Trial], others_set_rates: bool) -> tuple[str, ...]:
    notes = []
    failed = [trial.error for trial in done if trial.error is not None]
    if failed:
        last = f"{type(failed[-1]).__name__}: {failed[-1]}"
        notes.append(f"{len(failed)} of {len(done)} trials failed, the last one with {last}")
    if others_set_rates:
        notes.append(
            "The module or a callback sets learning rates between the steps, as an `optimizer_step` with a warmup "
            "does, which takes precedence over the rate of the optimizer: change the rate there."
        )
    return tuple(notes)


def _flag(trainer: L.Trainer, place: int, configured: float) -> str | None:
    """The argument that sets the rate of an optimizer, as a path of the command line."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ConfigureOptimizers):
            names = callback.names
            return "optim.lr" if not names else f"optim.optimizers.{names[place]}.lr"
    hparams = trainer.lightning_module.hparams
    named = [key for key in ("lr", "learning_rate") if hparams.get(key) == configured]
    return f"model.{named[0]}" if named else None
