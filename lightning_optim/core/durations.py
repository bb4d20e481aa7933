"""Notation for durations of training: ``500``, ``"500 steps"``, ``"2 epochs"``, ``"5%"``."""

from __future__ import annotations

import bisect
import math
import re
from dataclasses import dataclass, field

from lightning_optim.core.typed import typed

_PATTERN = re.compile(r"\s*(?P<amount>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>steps?|epochs?|%|percent)\s*", re.IGNORECASE)
_FORMS = "Write a number of optimizer steps (500 or '500 steps'), of epochs ('2 epochs') or a share of the run ('5%')."


@typed
@dataclass(frozen=True)
class Horizon:
    """The length of a run in optimizer steps.

    Args:
        total_steps: Optimizer steps of the whole run, at least 0; None if nothing bounds them (such as ``max_time``
            alone).
        steps_per_epoch: Optimizer steps of one epoch, on average; None if it is not known (an ``IterableDataset``).
        epoch_ends: Number of steps taken by the end of each epoch, in ascending order, where epochs differ in length;
            empty where all have ``steps_per_epoch``.
        is_trial: Whether the run is shorter than the one that is configured (``fast_dev_run``, a finder's trial): a
            schedule that is longer than the run is then scaled to it, not refused.

    Raises:
        ValueError: A length is negative or not finite.

    Example:
        >>> Duration.parse("2 epochs").steps(Horizon(total_steps=30, epoch_ends=(5, 15, 30)))
        15
    """

    total_steps: int | None = None
    steps_per_epoch: float | None = None
    epoch_ends: tuple[int, ...] = field(default=(), compare=False)
    is_trial: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("total_steps", "steps_per_epoch"):
            length = getattr(self, name)
            if length is not None and not (length >= 0 and math.isfinite(length)):
                raise ValueError(f"Invalid {name}={length!r} of Horizon: must be at least 0 and finite, or None.")

    def steps_at(self, epochs: float) -> float | None:
        """Return the number of steps taken after ``epochs`` epochs, interpolated within one; None if not known."""
        ends = (0, *self.epoch_ends)
        if len(ends) == 1:
            return None if self.steps_per_epoch is None else epochs * self.steps_per_epoch
        whole = min(int(epochs), len(ends) - 2)  # Beyond the last known epoch, further ones are as long as that.
        return ends[whole] + (epochs - whole) * (ends[whole + 1] - ends[whole])

    def epochs_at(self, step: float) -> float | None:
        """Return the number of epochs that have passed after ``step`` steps: the inverse of `steps_at`."""
        ends = (0, *self.epoch_ends)
        if len(ends) == 1:
            return step / self.steps_per_epoch if self.steps_per_epoch else None
        whole = min(max(bisect.bisect_right(ends, step) - 1, 0), len(ends) - 2)
        length = ends[whole + 1] - ends[whole]
        return whole + ((step - ends[whole]) / length if length else 0.0)


@typed
@dataclass(frozen=True)
class Duration:
    """Duration of training, which converts to a number of steps once the length of the run is known.

    Args:
        amount: Number of units, at least 0.
        unit: ``"steps"``, ``"epochs"`` or ``"percent"`` (of the whole run).

    Raises:
        ValueError: The unit is unknown, the amount is negative, not finite or above 100%, or steps are not whole.

    Example:
        >>> Duration.parse("5%").steps(Horizon(total_steps=1000))
        50
        >>> Duration.parse("2 epochs").steps(Horizon(total_steps=1000, steps_per_epoch=120))
        240
    """

    amount: float
    unit: str = "steps"

    def __post_init__(self) -> None:
        if self.unit not in ("steps", "epochs", "percent"):
            raise ValueError(f"Invalid duration unit {self.unit!r}. {_FORMS}")
        if not math.isfinite(self.amount) or self.amount < 0:
            raise ValueError(
                f"Invalid duration {self.amount!r} {self.unit}: it must be finite and at least 0. {_FORMS}"
            )
        if self.unit == "steps" and self.amount != int(self.amount):
            raise ValueError(f"Invalid duration of {self.amount} steps: steps are whole. {_FORMS}")
        if self.unit == "percent" and self.amount > 100:
            raise ValueError(f"Invalid duration {self}: at most 100% of the run. {_FORMS}")

    @classmethod
    def parse(cls, value: int | str | Duration) -> Duration:
        """Parse a duration in any of the notations.

        Args:
            value: ``500``, ``"500 steps"``, ``"2 epochs"``, ``"5%"``, or a `Duration`, which is returned as it is.

        Raises:
            ValueError: The value has none of these forms; the message lists them.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        if isinstance(value, str):
            if value.strip().isdecimal():
                return cls(int(value))
            if match := _PATTERN.fullmatch(value):
                unit = match["unit"].lower()
                unit = "percent" if unit in ("%", "percent") else unit.rstrip("s") + "s"
                return cls(float(match["amount"]), unit)
        hint = f" For {value * 100:g}% of the run write '{value * 100:g}%'." if _is_fraction(value) else ""
        raise ValueError(f"Cannot read the duration {value!r}.{hint} {_FORMS}")

    def steps(self, horizon: Horizon) -> int:
        """Convert the duration to optimizer steps, rounded to nearest; a positive duration is at least one step.

        Args:
            horizon: Length of the run.

        Raises:
            ValueError: The unit needs a length that is None in ``horizon``.
        """
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "epochs":
            found = horizon.steps_at(self.amount)
            if found is None:
                raise ValueError(f"The duration '{self}' needs the length of an epoch, which is not known. {_FORMS}")
            exact = found
        else:
            if horizon.total_steps is None:
                raise ValueError(f"The duration '{self}' needs the length of the run, which is not known. {_FORMS}")
            exact = self.amount / 100 * horizon.total_steps
        return max(round(exact), 1) if self.amount > 0 else 0

    @property
    def is_relative(self) -> bool:
        """Whether the duration depends on the length of the whole run."""
        return self.unit == "percent"

    def __bool__(self) -> bool:
        return self.amount > 0

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.unit == "percent" else f"{self.amount:g} {self.unit}"


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1
