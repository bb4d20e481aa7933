"""Checks of the values of a schedule: finite and at least 0, and multipliers of the peak, not learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

from lightning_optim.core.durations import Horizon
from lightning_optim.schedules.base import Schedule

SAMPLES = 101
"""Number of steps of a run at which a schedule is looked at beforehand."""

_LOW = 0.1
"""A schedule that stays below this all the time is hardly one of multipliers of the peak."""


def check_value(value: float, schedule: Schedule, step: int) -> None:
    """Refuse a multiplier that would ruin the parameters; two comparisons, whatever the number of tensors.

    Args:
        value: The multiplier, on the host.
        schedule: The schedule that gave it, for the message.
        step: The number of updates already taken, for the message.

    Raises:
        ValueError: ``value`` is negative or not finite.

    Example:
        >>> from lightning_optim.schedules import Constant
        >>> check_value(0.5, Constant(), step=3)
    """
    if not 0.0 <= value < math.inf:  # false for a NaN, too
        raise ValueError(
            f"Invalid value {value:g} of the schedule {schedule!r} at step {step}: a multiplier must be finite and at "
            "least 0."
        )


def check_values(schedule: Schedule, horizon: Horizon, label: str, peak: float | None = None) -> None:
    """Sample a schedule over a run, refuse what `check_value` refuses, and warn of learning rates for multipliers.

    Without a known end only the first step is looked at. What a function raises is left to the step at which it does.

    Args:
        schedule: The schedule; one that names a learning rate must have been converted by `Schedule.for_peak`.
        horizon: Length of the run.
        label: What the schedule drives, for the message: ``"lr"``, ``"weight_decay"``.
        peak: The peak learning rate, if that is what it drives: then values that look like learning rates are warned
            about. None for no such warning.

    Raises:
        ValueError: A sampled value is negative or not finite.

    Example:
        >>> from lightning_optim.schedules.function import FromFunction
        >>> check_values(FromFunction(lambda step: 1 - step / 10), Horizon(total_steps=100), "lr")
        Traceback (most recent call last):
        ...
        ValueError: Schedule of lr: Invalid value -0.1 of the schedule FromFunction(...) at step 11: ...
    """
    curve = schedule.over(horizon)
    values = []
    for step in _steps(horizon):
        value = _value(curve, step)
        if value is None:
            continue
        try:
            check_value(value, schedule, step)
        except ValueError as error:
            raise ValueError(f"Schedule of {label}: {error}") from None
        values.append(value)
    is_whole = horizon.total_steps is not None and not horizon.is_trial
    if peak is not None and is_whole and _are_rates(values, peak):
        highest = max(values)
        warnings.warn(
            f"The schedule {schedule!r} of {label} gives {highest:.3g} at most, so the learning rate stays at or below "
            f"{highest * peak:.3g}, though lr={peak:g}. The values of a schedule are multipliers of lr, not learning "
            "rates: divide them by lr, or give lr=1.",
            stacklevel=2,
        )


def _steps(horizon: Horizon) -> Iterator[int]:
    last = max((horizon.total_steps or 1) - 1, 0)  # The value after the last update is used by none.
    yield from dict.fromkeys(round(index * last / (SAMPLES - 1)) for index in range(SAMPLES))


def _value(curve: Callable[[int], float], step: int) -> float | None:
    """The value, or None where a user's function has none: the run may end before."""
    try:
        return curve(step)
    except Exception:
        return None


def _are_rates(values: list[float], peak: float) -> bool:
    """Whether these look like learning rates of a run whose peak is ``peak``.

    ``lr=1`` with rates for multipliers is a common and right way to write a schedule.
    """
    if not values or not 0 < peak < 1:
        return False
    highest = max(values)
    if len(values) > 1 and highest == values[-1] > values[0]:  # a warmup that the run is too short for
        return False
    return 0 < highest < _LOW
