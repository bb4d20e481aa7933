"""Which learning rate is best, from short trials from the same point on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_optim.tuning.rates.halving import Trial, indistinguishable
from lightning_optim.tuning.rates.horizon import horizon_factor

__all__ = ["RateTrials", "around", "try_rates"]

Run = Callable[[float, int], Sequence[float]]

_COARSE = 0.5
"""Decades between the rates of the first round."""

_FINE = 0.25
"""Decades between the rates of the later rounds."""


@dataclass(frozen=True)
class RateTrials:
    """What the trials tell.

    Args:
        lr: The suggested rate; None if they do not tell.
        low: Lowest rate that cannot be told apart from the best one; None without ``lr``.
        high: Highest one; None without ``lr``.
        reason: Why this rate, or why none, as a sentence.
        trials: All trials, in the order they were run.
    """

    lr: float | None
    low: float | None
    high: float | None
    reason: str
    trials: tuple[Trial[float], ...]

    @property
    def longest(self) -> dict[float, Trial[float]]:
        """The longest trial of each rate, by increasing rate."""
        found: dict[float, Trial[float]] = {}
        for trial in sorted(self.trials, key=lambda trial: (trial.value, trial.steps)):
            found[trial.value] = trial
        return found


def around(usual: tuple[float, float] | None, lr: float) -> tuple[float, float]:
    """Return the range of rates to begin with.

    Args:
        usual: The optimizer's ``usual_lr``; None if it has none.
        lr: The configured rate.
    """
    low, high = usual or (lr / 10, lr * 10)
    return min(low, lr), max(high, lr)


class _Bench:
    """Runs trials, each once, and knows them all."""

    def __init__(self, run: Run, limit: int) -> None:
        self._run, self._limit = run, limit
        self.done: dict[tuple[float, int], Trial[float]] = {}

    @property
    def full(self) -> bool:
        return len(self.done) >= self._limit

    def trial(self, lr: float, steps: int) -> Trial[float]:
        lr = float(f"{lr:.4g}")
        if (lr, steps) not in self.done:
            self.done[lr, steps] = Trial(lr, steps, tuple(map(float, self._run(lr, steps))))
        return self.done[lr, steps]

    def at(self, steps: int) -> list[Trial[float]]:
        """All trials of a length, by increasing rate."""
        return sorted((t for t in self.done.values() if t.steps == steps), key=lambda trial: trial.value)

    def search(self, decades: float, steps: int) -> Trial[float] | None:
        """Go on beyond the edges until the best trial has a worse one on each side; None if all have diverged."""
        while True:
            trials = self.at(steps)
            best = min(trials, key=lambda trial: trial.score)
            alive = not best.diverged
            if self.full or (alive and trials[0] is not best and trials[-1] is not best):
                return best if alive else None
            if trials[-1] is best and alive:
                self.trial(best.value * 10**decades, steps)
            else:
                self.trial(trials[0].value / 10**decades, steps)


def try_rates(
    run: Run,
    low: float,
    high: float,
    steps: int,
    *,
    total_steps: float | None = None,
    optimizer: type | None = None,
    limit: int = 30,
) -> RateTrials:
    """Find the best learning rate by trials in three rounds, of a quarter, half and all of ``steps``.

    The first round tries rates half a decade apart from ``low`` to ``high``, and beyond where the best one is at an
    edge. The second tries those around the best one, a quarter of a decade apart; the third the best one and its
    neighbours with all steps, and is what the suggestion is from: the bottom of the parabola through the best three.

    Args:
        run: Trains from the same point, on the same batches in the same order, with a rate for so many steps, and
            returns the losses; fewer than asked for if the training was given up because it diverged.
        low: Lowest rate to begin with, above 0.
        high: Highest rate to begin with, at least ``low``.
        steps: Steps of a trial in the last round, at least 20.
        total_steps: Steps of the run that the rate is for, which needs a lower rate if it is longer; None for as many.
        optimizer: Class of the optimizer; how its best rate depends on the length of a run.
        limit: Most trials of a search.

    Raises:
        ValueError: A value is out of its range.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"Invalid low={low!r}, high={high!r}: must be finite rates above 0, low first.")
    if steps < 20:
        raise ValueError(f"Invalid steps={steps!r}: must be at least 20, a quarter of which are the first round's.")
    bench = _Bench(run, limit)
    count = max(round(math.log10(high / low) / _COARSE), 2)
    for number in range(count + 1):
        bench.trial(low * (high / low) ** (number / count), steps // 4)
    best = bench.search(_COARSE, steps // 4)
    for length in (steps // 2, steps):
        if best is not None:
            for decades in (-2, -1, 0, 1, 2) if length < steps else (-1, 0, 1):
                bench.trial(best.value * 10 ** (_FINE * decades), length)
            best = bench.search(_FINE, length)
    trials = tuple(bench.done.values())
    if best is None:
        return RateTrials(None, None, None, "every trial diverged: begin with lower rates", trials)
    lr = _bottom(bench.at(steps), best)
    low, high = _interval(trials, best)
    low, high = min(low, lr), max(high, lr)
    if high > 10 * low:
        reason = f"cannot tell rates from {low:.2g} to {high:.2g} apart: take more than {steps} steps ({4 * steps})"
        return RateTrials(None, low, high, reason, trials)
    reason = f"the least loss after {steps} steps is at {lr:.3g}, and {low:.2g} to {high:.2g} are as good"
    factor = horizon_factor(steps, total_steps, optimizer)
    if factor < 1:
        reason += f"; times {factor:.2g}, because {total_steps:g} steps need a lower rate"
    lr, low, high = (float(f"{rate * factor:.3g}") for rate in (lr, low, high))
    return RateTrials(lr, low, high, reason, trials)


def _bottom(trials: Sequence[Trial[float]], best: Trial[float]) -> float:
    """Bottom of the parabola in the logarithm of the rate through the best trial and its neighbours."""
    place = [trial.value for trial in trials].index(best.value)
    if not 0 < place < len(trials) - 1:
        return best.value
    near = trials[place - 1 : place + 2]
    if near[0].diverged or near[2].diverged:
        return best.value
    left, right = (math.log(trial.value / best.value) for trial in (near[0], near[2]))
    below, above = ((trial.score - best.score) for trial in (near[0], near[2]))
    # Slope and curvature of the parabola through (left, below), (0, 0) and (right, above).
    curvature = (above / right - below / left) / (right - left)
    if curvature <= 0:
        return best.value
    slope = below / left - curvature * left
    return float(f"{best.value * math.exp(min(max(-slope / (2 * curvature), left), right)):.3g}")


def _interval(trials: Sequence[Trial[float]], best: Trial[float]) -> tuple[float, float]:
    """Lowest and highest rate that cannot be told apart from the best one, with all rates between alike.

    A rate that the last round did not try is judged by the longest round that tried it, against that round's best.
    """
    alike = {best.value}
    for length in {trial.steps for trial in trials}:
        ranked = sorted((t for t in trials if t.steps == length and not t.diverged), key=lambda trial: trial.score)
        judged = {t.value for t in trials if t.steps > length}
        alike |= indistinguishable(ranked) - judged if ranked else set()
    low = high = best.value
    values = sorted({trial.value for trial in trials})
    place = values.index(best.value)
    for value in reversed(values[:place]):
        if value not in alike:
            break
        low = value
    for value in values[place + 1 :]:
        if value not in alike:
            break
        high = value
    return low, high
