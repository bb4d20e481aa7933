"""Advice on the batch size, from the gradient noise scale."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SOURCE = "McCandlish et al., 2018, https://arxiv.org/abs/1812.06162"
_LEAST = 8
"""Number of measured steps below which no interval is computed."""


@dataclass(frozen=True)
class CriticalBatch:
    """An estimate of the critical batch size, which is the gradient noise scale.

    Args:
        size: The estimate, in samples of an optimizer step; None if the measurements do not tell.
        low: Lower end of its 80 % interval.
        high: Upper end; infinite where the gradient cannot be told from noise.
    """

    size: float | None
    low: float = 0.0
    high: float = math.inf

    def steps(self, batch: float, other: float) -> float:
        """Return the number of steps with ``other`` samples over that with ``batch``, to the same loss.

        Args:
            batch: Number of samples of a step.
            other: Another such number.

        Raises:
            ValueError: The size is not known.

        Example:
            >>> round(CriticalBatch(1000.0).steps(10, 20), 3)  # far below: twice the batch, half the steps
            0.505
            >>> round(CriticalBatch(1000.0).steps(10_000, 20_000), 3)
            0.955
        """
        if self.size is None:
            raise ValueError("The critical batch size is not known: measure more steps.")
        return (1 + self.size / other) / (1 + self.size / batch)


def critical_batch(pairs: Sequence[tuple[float, float]], small: float, large: float) -> CriticalBatch:
    """Estimate the critical batch size from gradients of a small and of a large batch.

    Numerator tr(Σ) and denominator |G|² are each averaged over all steps before the division; the interval is that of
    a bootstrap over steps.

    Args:
        pairs: For each step the square norm of the mean gradient of ``small`` samples, and of ``large`` samples.
        small: Number of samples of the small batch.
        large: Number of samples of the large batch, above ``small``.

    Returns:
        The estimate; its size is None if fewer than 8 steps are finite, or the averages are not positive.

    Raises:
        ValueError: ``large`` is not above ``small``.

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162,
        appendix A.1.

    Example:
        >>> critical_batch([(5.0, 2.0)] * 8, small=2, large=8).size  # |G|² = 1, tr(Σ) = 8
        8.0
    """
    if not large > small:
        raise ValueError(f"Invalid large={large!r}: must be above small={small!r}.")
    parts = [
        ((small_sq - large_sq) / (1 / small - 1 / large), (large * large_sq - small * small_sq) / (large - small))
        for small_sq, large_sq in pairs
        if math.isfinite(small_sq) and math.isfinite(large_sq)
    ]
    if len(parts) < _LEAST:
        return CriticalBatch(None)
    draw = random.Random(0)
    drawn = sorted(_ratio([draw.choice(parts) for _ in parts]) for _ in range(400))
    size = _ratio(parts)
    low, high = drawn[40], drawn[-41]
    return CriticalBatch(size, low, high) if 0 < size < math.inf else CriticalBatch(None, low, high)


def _ratio(parts: Sequence[tuple[float, float]]) -> float:
    """tr(Σ)/|G|²; infinite where nothing but noise is left of the gradient, 0 where there is no noise."""
    noise, signal = (statistics.fmean(column) for column in zip(*parts, strict=True))
    return max(noise, 0.0) / signal if signal > 0 else math.inf


def advice(critical: CriticalBatch, batch: int) -> str:
    r"""Say what another batch size would change.

    Args:
        critical: The critical batch size.
        batch: Present number of samples of an optimizer step.

    Returns:
        One or two sentences.

    Raises:
        ValueError: ``batch`` is below 1.

    Example:
        >>> print(advice(CriticalBatch(310.0, 220.0, 450.0), 64).replace("; above", ";\nabove"))
        Critical batch size about 310 (220 to 450): below it, doubling the batch nearly halves the steps;
        above it, it does not. From 64 to 128 samples: 41 % fewer steps, 17 % more samples to the same loss.
    """
    if batch < 1:
        raise ValueError(f"Invalid batch={batch!r}: must be a number of samples, of at least 1.")
    if critical.size is None:
        reason = "" if critical.high < math.inf else ": the gradient cannot be told from its noise"
        return f"The critical batch size cannot be told from these steps{reason}. Measure more steps."
    around = f"about {critical.size:.2g}" if critical.size < 100 else f"about {_round(critical.size)}"
    high = "more than can be told" if critical.high == math.inf else _round(critical.high)
    fewer = 1 - critical.steps(batch, 2 * batch)
    more = 2 * (1 - fewer) - 1
    return (
        f"Critical batch size {around} ({_round(critical.low)} to {high}): below it, doubling the batch nearly halves "
        f"the steps; above it, it does not. From {batch} to {2 * batch} samples: {fewer:.0%} fewer steps, {more:.0%} "
        "more samples to the same loss."
    ).replace("%", " %")


def _round(value: float) -> str:
    """Two significant digits, without an exponent."""
    if value < 1:
        return f"{value:.2g}"
    digits = max(int(math.log10(value)) - 1, 0)
    return f"{round(value / 10**digits) * 10**digits:,}"
