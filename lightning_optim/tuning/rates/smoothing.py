"""Smoothing of losses over evenly spaced steps of a sweep, whose rates grow by the same factor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Smoother", "capped", "despiked", "filled"]

Floats = NDArray[np.float64]


def filled(losses: Floats) -> Floats:
    """Return losses `[steps]` in which those that are not finite lie on a line between their neighbours.

    Args:
        losses: Losses, `[steps]`, at least one of them finite.
    """
    place = np.arange(len(losses))
    finite = np.isfinite(losses)
    return np.interp(place, place[finite], losses[finite])


def despiked(losses: Floats, window: int = 5, limit: float = 4.0) -> Floats:
    """Return losses `[steps]` in which single batches far from their neighbours have the neighbours' median.

    Args:
        losses: Losses, `[steps]`; NaN stays NaN.
        window: Odd number of losses in the median.
        limit: Standard deviations of the local noise from which a loss is a spike.
    """
    half = window // 2
    padded = np.pad(losses, half, constant_values=np.nan)
    views = np.lib.stride_tricks.sliding_window_view(padded, window)
    with np.errstate(all="ignore"):
        median = _nanmedian(views)
        away = losses - median
        wide = np.lib.stride_tricks.sliding_window_view(np.pad(np.abs(away), 5, constant_values=np.nan), 11)
        scale = 1.4826 * _nanmedian(wide)
    spike = np.abs(away) > limit * np.where(scale > 0, scale, np.inf)
    return np.where(spike, median, losses)


def capped(losses: Floats, start: int) -> Floats:
    """Return losses `[steps]` whose rise over the start is at most the descent, so that the end does not hide the rest.

    Args:
        losses: Losses, `[steps]`.
        start: How many of the first losses are the start.
    """
    level = float(np.nanmedian(losses[:start]))
    views = np.lib.stride_tricks.sliding_window_view(losses, min(5, len(losses)))
    least = float(np.nanmin(_nanmedian(views)))
    spread = float(np.nanmedian(np.abs(losses[:start] - level)))
    return np.minimum(losses, level + max(level - least, 4.0 * spread))


def _nanmedian(views: Floats) -> Floats:
    """Median over the last axis, NaN without a warning where there is nothing."""
    nothing = np.asarray(~np.any(np.isfinite(views), axis=-1))
    median = np.nanmedian(np.where(nothing[..., None], 0.0, views), axis=-1)
    return np.where(nothing, np.nan, median)


class Smoother:
    """Local lines with Gaussian weights, as matrices: smoothing a resampled curve is one product.

    Args:
        steps: Number of losses.
        width: Standard deviation of the weights, in steps.
    """

    def __init__(self, steps: int, width: float) -> None:
        place = np.arange(steps, dtype=np.float64)
        away = place[None, :] - place[:, None]  # away[i, j]: of loss j from place i
        weights = np.exp(-0.5 * (away / width) ** 2)
        s0, s1, s2 = (np.sum(weights * away**k, axis=1, keepdims=True) for k in range(3))
        determinant = s0 * s2 - s1**2
        self.values: Floats = weights * (s2 - s1 * away) / determinant
        """`[steps, steps]`: times the losses, the smoothed ones."""
        self.slopes: Floats = weights * (s0 * away - s1) / determinant
        """`[steps, steps]`: times the losses, the smoothed change per step."""
