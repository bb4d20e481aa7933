"""The learning rate that the losses of a range test suggest, with its interval, or why they suggest none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_optim.tuning.rates.horizon import horizon_factor
from lightning_optim.tuning.rates.smoothing import Floats, Smoother, capped, despiked, filled

__all__ = ["Suggestion", "suggest"]

_STEPS_PER_DECADE = 0.5
"""A sweep with half as many steps per decade as a run has steps has its least loss at the best rate of that run;
measured (docs/benchmarks.md), with one number for all optimizers, because one for each was worse on tasks it was not
fitted to."""

_WIDTHS = (0.25, 0.5)
"""Decades over which losses are smoothed; the second where the first does not tell."""

_LEAST_STEPS = 20
_LEAST_WIDTH = 2.0
_BLOCK = 5
_CLEAR = 5.0
"""Standard errors of a descent that is no chance: the least of fifty independent points lies 2.2 below their mean."""

_LEVEL = (0.05, 0.95)
_WIDEST = 10.0


@dataclass(frozen=True)
class Suggestion:
    """What a sweep suggests.

    Args:
        lr: The suggested rate; None if the losses do not tell.
        low: Lower end of its 90 % interval; None where there is none.
        high: Upper end; None where there is none.
        reason: Why this rate, or why none and what to do, as a sentence.
        rates: Rates of the sweep as far as it went, `[steps]`.
        losses: Mean losses of the repeats, `[steps]`, spikes removed and the rise at the end cut.
        smoothed: The same, smoothed, `[steps]`.
        minimum: Rate with the least smoothed loss; None where the losses do not tell.
    """

    lr: float | None
    low: float | None
    high: float | None
    reason: str
    rates: Floats
    losses: Floats
    smoothed: Floats
    minimum: float | None = None


def suggest(
    rates: Sequence[float],
    losses: Sequence[Sequence[float]],
    *,
    total_steps: float | None = None,
    optimizer: type | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Suggestion:
    """Suggest a learning rate from the losses of a sweep.

    The losses of the repeats are freed of spikes, cut where they rise above their start, averaged, and smoothed by
    local lines in the logarithm of the rate. The suggestion is the rate with the least smoothed loss, times a factor
    for the length of the run: a sweep spends few steps at each rate, and a longer run needs a lower one. The interval
    is from resampled residuals (the wild bootstrap in blocks). Neither scale nor zero of the loss matters.

    Args:
        rates: Rates of the steps, at least 2, each the same factor above the one before.
        losses: Losses of each repeat, at most as many as rates; fewer if it ended early. NaN and infinity may occur.
        total_steps: Steps of the run that the rate is for; None for the least loss itself.
        optimizer: Class of the optimizer; how its best rate depends on the length of a run.
        resamples: Number of resampled curves.
        seed: Seed of the resampling.

    Raises:
        ValueError: There are fewer than two rates, they do not grow, there is no repeat, or one has too many losses.
    """
    grid = np.asarray(rates, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not (grid[0] > 0 and np.all(np.diff(grid) > 0) and np.isfinite(grid[-1])):
        raise ValueError(f"Invalid rates={_short(rates)}: must be at least two finite rates above 0 that grow.")
    table = [np.asarray(repeat, dtype=np.float64) for repeat in losses]
    if not table or any(len(repeat) > len(grid) for repeat in table):
        lengths = [len(repeat) for repeat in table]
        raise ValueError(
            f"Invalid losses of {lengths} steps: must be at least one repeat, of at most {len(grid)} steps."
        )
    per_decade = (len(grid) - 1) / math.log10(grid[-1] / grid[0])
    found = None
    for decades in _WIDTHS:
        found = _suggest(grid, table, max(decades * per_decade, _LEAST_WIDTH), resamples, seed)
        if found.lr is not None:
            break
    assert found is not None
    if found.lr is None:
        return found
    factor = horizon_factor(per_decade / _STEPS_PER_DECADE, total_steps, optimizer)
    lr, low, high = (_digits(rate * factor) for rate in (found.lr, found.low or 0.0, found.high or 0.0))
    reason = f"the least smoothed loss is at {_digits(found.lr):g}"
    if factor < 1:
        reason += f"; times {factor:.2g}, because {total_steps:g} steps need a lower rate than a sweep of {len(grid)}"
    return Suggestion(lr, low, high, reason, found.rates, found.losses, found.smoothed, _digits(found.lr))


def _suggest(grid: Floats, table: list[Floats], width: float, resamples: int, seed: int) -> Suggestion:
    """The rate with the least loss that is smoothed over ``width`` steps."""
    length = max((_usable(repeat) for repeat in table), default=0)
    more = f"use more steps ({max(2 * len(grid), 100)}) or repeats"
    if length < _LEAST_STEPS:
        short = np.full(length, np.nan)
        began = "the losses are not finite from the beginning: lower the first rate" if len(grid) >= 40 else more
        return Suggestion(None, None, None, f"cannot tell from {length} losses: {began}", grid[:length], short, short)
    clean = [_clean(repeat[:length], length) for repeat in table if _usable(repeat) >= _LEAST_STEPS]
    rows = np.stack(clean)
    mean = rows.mean(axis=0)
    smoother = Smoother(length, width)
    smooth = smoother.values @ mean
    place = int(np.argmin(smooth))
    seen = grid[:length], mean, smooth

    # Wild bootstrap: residuals stay where they are, because noise grows with the rate, and blocks of them, because
    # neighbours are alike, change their signs. A residual of the smoothed curve is smaller than the noise.
    shrunk = np.sqrt(np.maximum(1.0 - 2.0 * np.diag(smoother.values) + np.sum(smoother.values**2, axis=1), 0.1))
    residuals = (rows - smooth) / shrunk
    generator = np.random.default_rng(seed)
    blocks = -(-length // _BLOCK)
    signs = generator.choice([-1.0, 1.0], size=(resamples, len(rows), blocks)).repeat(_BLOCK, axis=2)[..., :length]
    curves = smooth + ((signs * residuals).mean(axis=1)) @ smoother.values.T

    rounding = 1e-9 * float(np.max(np.abs(mean)))
    top = int(np.argmax(smooth[: place + 1]))
    # The level before the descent is the mean of what precedes, not its highest point by chance.
    descent = float(np.mean(smooth[: max(top, min(int(width), place)) + 1]) - smooth[place])
    if descent <= max(_CLEAR * float(np.std(curves[:, top] - curves[:, place])), rounding):
        if _rises(mean):
            return Suggestion(None, None, None, "the loss only rises: lower the first rate", *seen)
        return Suggestion(None, None, None, f"cannot tell: the loss does not fall beyond its noise; {more}", *seen)
    if length == len(grid) and place >= length - 1 - width / 2:
        return Suggestion(
            None, None, None, f"the loss still falls at the highest rate, {_digits(grid[-1]):g}: raise it", *seen
        )
    places = np.argmin(curves, axis=1)
    low, high = (float(np.exp(np.quantile(np.log(grid[places]), level))) for level in _LEVEL)
    low, high = min(low, float(grid[place])), max(high, float(grid[place]))
    if high > _WIDEST * low:
        reason = f"cannot tell rates from {low:.2g} to {high:.2g} apart: {more}"
        return Suggestion(None, _digits(low), _digits(high), reason, *seen)
    return Suggestion(float(grid[place]), low, high, "", *seen)


def _rises(losses: Floats) -> bool:
    """Whether the last third lies above the first one by more than chance, noise seen from one loss to the next."""
    third = len(losses) // 3
    noise = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / math.sqrt(2)
    rise = float(np.mean(losses[-third:]) - np.mean(losses[:third]))
    return rise > max(_CLEAR * noise * math.sqrt(2 / third), 1e-9 * float(np.max(np.abs(losses))))


def _usable(losses: Floats) -> int:
    """Number of losses up to the last one that is finite."""
    finite = np.nonzero(np.isfinite(losses))[0]
    return int(finite[-1]) + 1 if len(finite) else 0


def _clean(losses: Floats, length: int) -> Floats:
    """Losses of one repeat, of ``length`` steps: without gaps, spikes and the rise at the end."""
    own = losses[: _usable(losses)]
    own = capped(despiked(filled(own)), max(len(own) // 5, 5))
    # Where this repeat has diverged and others go on, it stays as high as losses are cut.
    return np.concatenate([own, np.full(length - len(own), np.max(own))])


def _digits(rate: float) -> float:
    return float(f"{rate:.3g}")


def _short(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in list(values)[:4])
    return f"[{text}{', ...' if len(values) > 4 else ''}]"
