"""A sweep or trials for every optimizer of a fit, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
from torch.optim import Optimizer

from lightning_optim.callbacks import ConfigureOptimizers
from lightning_optim.factory.about import optimizer_names
from lightning_optim.factory.plan_advice import usual_lr
from lightning_optim.factory.run_length import horizon_of
from lightning_optim.tuning.rates.found import FoundRate, FoundRates
from lightning_optim.tuning.rates.rate_trials import around, try_rates
from lightning_optim.tuning.rates.suggestion import suggest
from lightning_optim.tuning.rates.sweep import Divergence, exponential
from lightning_optim.tuning.trials.fit import FitTrials, Stop, Trial

METHODS = ("sweep", "trials")

Progress = Callable[[str], object]
"""Is told of each trial that begins."""


def measure(
    trials: FitTrials,
    trainer: L.Trainer,
    method: str,
    steps: int,
    repeats: int,
    low: float | None,
    high: float | None,
    progress: Progress,
) -> FoundRates:
    """Find a rate for each optimizer.

    Args:
        trials: Trials from the present point.
        trainer: The Trainer.
        method: ``"sweep"`` or ``"trials"``.
        steps: Steps of a sweep, or of a trial of the last round.
        repeats: Sweeps, each on data in another order.
        low: Lowest rate; None for one by the optimizer.
        high: Highest rate.
        progress: Is told of each trial that begins.

    Returns:
        What has been found.

    Raises:
        RuntimeError: Not a single trial went through.
    """
    names, total = optimizer_names(trials.optimizers), horizon_of(trainer).total_steps
    if len(names) == 1:
        names = [type(trials.optimizers[0]).__name__]
    found = []
    for place, name in enumerate(names):
        optimizer, configured = trials.optimizers[place], trials.peaks[place].base
        began, done = time.monotonic(), list[Trial]()
        lowest, highest = _range(optimizer, configured, method)
        lowest, highest = lowest if low is None else low, highest if high is None else high
        if method == "sweep":
            rates = exponential(lowest, highest, steps)
            for repeat in range(repeats):
                progress(f"{name}: sweep {repeat + 1} of {repeats}")
                done.append(trials.sweep(place, rates, _divergence(), seed=repeat))
            _check(done, name)
            evidence: Any = suggest(rates, _unlike(done), total_steps=total, optimizer=type(optimizer))
        else:

            def run(rate: float, length: int, place: int = place, name: str = name, done: Any = done) -> list[float]:
                progress(f"{name}: {length} steps at {rate:.3g}")
                done.append(trials.at(place, rate, length, _divergence()))
                return list(done[-1].losses) if done[-1].ended == "finished" else []

            evidence = try_rates(run, lowest, highest, steps, total_steps=total, optimizer=type(optimizer))
            _check(done, name)
        found.append(FoundRate(name, configured, evidence, time.monotonic() - began, _flag(trainer, place, configured)))
    return FoundRates(tuple(found), method, _notes(done))


def _range(optimizer: Optimizer, configured: float, method: str) -> tuple[float, float]:
    """The rates to look at, where nobody says."""
    low, high = around(usual_lr(optimizer), configured)
    # A decade is enough of a plateau to see a descent from; steps on it are lost to where the loss is least.
    return (low, high) if method == "trials" else (low / 10, high * 100)


def _divergence() -> Stop:
    divergence = Divergence()
    return lambda losses: divergence.update(losses[-1]) is not None


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
        raise RuntimeError(f"No trial of {name} went through: {type(error).__name__}: {error}") from error


def _notes(done: Sequence[Trial]) -> tuple[str, ...]:
    failed = [trial.error for trial in done if trial.error is not None]
    if not failed:
        return ()
    return (f"{len(failed)} of {len(done)} trials failed, the last one with {type(failed[-1]).__name__}: {failed[-1]}",)


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
