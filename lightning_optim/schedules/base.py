"""What a schedule is: a multiplier as a pure function of the step, composed of warmup, hold, shape and cooldown."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.core.typed import typed
from lightning_optim.schedules.phases import Cooldown, Warmup


@dataclass(frozen=True)
class Position:
    """Where in its shape a schedule stands.

    Args:
        step: Steps since the shape began; may lie beyond its end only where the shape needs no length, and between
            two steps where the length of the run has changed (`RunClock`).
        length: Length of the shape in steps; 0 if the run has no known length.
        start: Step of the run at which the shape began: warmup and hold come before.
        warmup: Length of the warmup in steps.
        run: Length of the whole run, in which durations are read.
    """

    step: float
    length: int
    start: int
    warmup: int
    run: Horizon

    @property
    def progress(self) -> float:
        """Fraction of the shape that has passed: 0 at its beginning, 1 at its end and beyond."""
        # A warmup as long as the run leaves a shape of no steps: it is at its end.
        return min(self.step / self.length, 1.0) if self.length > 0 else 1.0


@dataclass(frozen=True)
class Phases:
    """The parts of a schedule in steps, in their order; the shape's is 0 if the run has no known length."""

    warmup: int
    hold: int
    shape: int
    cooldown: int


@typed
class Schedule(ABC):
    """A multiplier of the peak as a function of the step: a warmup, a hold at the peak, a shape, a cooldown.

    ``step`` counts the updates already taken, so the first update uses ``schedule(0, ...)``. The shape starts with a
    multiplier of 1 right after warmup and hold, and reaches its end where the cooldown begins, which without one is the
    end of the run.

    To write one, subclass, define `shape`, and set `shape_needs_total` to False if it needs no length of the run. Keep
    the constructor's arguments as attributes under their own names.

    Args:
        warmup: Length of the warmup: ``500``, ``"500 steps"``, ``"2 epochs"`` or ``"5%"`` of the run; or a
            [`Warmup`][lightning_optim.schedules.Warmup], which has a shape and a start, too.
        hold: How long to stay at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a [`Cooldown`][lightning_optim.schedules.Cooldown].

    Raises:
        ValueError: A duration cannot be read, or (when called) they are longer than the run, or the schedule needs the
            length of the run and none is given.
    """

    shape_needs_total = True
    final_lr: float | None = None

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        self.warmup = warmup if isinstance(warmup, Warmup) else Warmup(warmup)
        self.hold = Duration.parse(hold)
        self.cooldown = cooldown if isinstance(cooldown, Cooldown) else Cooldown(cooldown)

    @abstractmethod
    def shape(self, at: Position) -> float:
        """Compute the multiplier at a position of the shape; 1 at its beginning."""

    @property
    def needs_total(self) -> bool:
        """Whether the schedule is undefined without the length of the run."""
        return (
            self.shape_needs_total
            or bool(self.cooldown.duration)
            or any(duration.is_relative for duration in _durations(vars(self)))
        )

    @property
    def needs_length(self) -> bool:
        """Whether the schedule is undefined without the length of the run or of its epochs."""
        return self.needs_total or any(duration.unit == "epochs" for duration in _durations(vars(self)))

    @property
    def is_absolute(self) -> bool:
        """Whether it names a learning rate (``final_lr``, ``start_lr``), which is a multiplier of a known peak only."""
        return not (self.final_lr is None and self.cooldown.final_lr is None and self.warmup.start_lr is None)

    def for_peak(self, peak: float) -> Schedule:
        """Convert learning rates that the schedule names into multipliers, for a group of this peak.

        Args:
            peak: The group's peak learning rate.

        Returns:
            The schedule itself if it names no learning rate, else a copy that names none.

        Example:
            >>> from lightning_optim.schedules import Cosine
            >>> [Cosine(final_lr=1e-4).for_peak(peak)(100, 100) for peak in (1e-3, 4e-4)]
            [0.1, 0.25]
        """
        if not self.is_absolute:
            return self
        peak = peak or 1.0  # nothing comes of 0, whatever the multiplier
        twin = copy.copy(self)
        twin.warmup, twin.cooldown = self.warmup.for_peak(peak), self.cooldown.for_peak(peak)
        if self.final_lr is not None:
            vars(twin).update(final=self.final_lr / peak, final_lr=None)
        return twin

    def check_peak(self, peak: float, label: str) -> None:
        """Refuse a learning rate of this schedule that is not below the peak of a group.

        Args:
            peak: The group's peak learning rate.
            label: What to call the group in the message.

        Raises:
            ValueError: ``final_lr`` is above the peak, or ``start_lr`` is not below it.
        """
        rates = {
            "final_lr": self.final_lr,
            "final_lr of the cooldown": self.cooldown.final_lr,
            "start_lr of the warmup": self.warmup.start_lr,
        }
        for name, rate in rates.items():
            if rate is not None and (rate > peak or (rate == peak and name.startswith("start"))):
                raise ValueError(
                    f"{self}: {name}={rate:g} is not below the peak learning rate of {label}, {peak:g}. Give a lower "
                    "one, or the group a schedule of its own."
                )

    def check_no_rate(self, label: str) -> None:
        """Refuse a schedule that names a learning rate for a hyperparameter that is not one.

        Args:
            label: What to call the hyperparameter in the message.

        Raises:
            ValueError: The schedule names a learning rate.
        """
        if self.is_absolute:
            raise ValueError(
                f"{self} names a learning rate, and is to drive {label}. Give multipliers: final, and start of a "
                "Warmup, in place of final_lr and start_lr."
            )

    def __call__(self, step: int, total_steps: int | None = None, steps_per_epoch: float | None = None) -> float:
        """Compute the multiplier of one update. For many updates of one run, compile it once with `over`.

        Args:
            step: Number of updates already taken; may lie beyond ``total_steps``.
            total_steps: Length of the run in optimizer steps, or None if nothing bounds it.
            steps_per_epoch: Length of an epoch in optimizer steps, or None if it is not known.

        Raises:
            ValueError: As for `over`.
        """
        run = Horizon(total_steps, steps_per_epoch)
        # A subclass that overrides this method and calls super() must not be called again by `over`.
        return (self._curve(run) if _overrides_call(self) else self.over(run))(step)

    def over(self, horizon: Horizon) -> Callable[[float], float]:
        """Compile the schedule for a run: durations are converted and phases computed here, once.

        Args:
            horizon: Length of the run.

        Returns:
            The multiplier of the peak, as a function of the number of updates already taken.

        Raises:
            ValueError: The phases are longer than the run, the schedule needs a length that ``horizon`` does not have,
                or it names a learning rate, which is a multiplier of a known peak only (`for_peak`).

        Example:
            >>> from lightning_optim.schedules import Linear
            >>> multiplier = Linear(warmup="10%").over(Horizon(total_steps=20))
            >>> [multiplier(step) for step in (0, 1, 2, 11, 20)]
            [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        if _overrides_call(self):
            return lambda step: self(int(step), horizon.total_steps, horizon.steps_per_epoch)
        return self._curve(horizon)

    def _curve(self, run: Horizon) -> Callable[[float], float]:
        if self.is_absolute:
            raise ValueError(
                f"{self} names a learning rate, so it is a multiplier of a known peak only: call for_peak(lr) first. "
                "What is no learning rate takes multipliers: start and final."
            )
        phases = self.phases(run)
        start = phases.warmup + phases.hold
        end = start + phases.shape
        bounded = self.shape_needs_total

        def multiplier(step: float) -> float:
            if step < phases.warmup:
                return self.warmup.multiplier(step, phases.warmup)
            if step < start:
                return 1.0
            since = (min(step, end) if bounded else step) - start
            value = self.shape(Position(since, phases.shape, start, phases.warmup, run))
            if phases.cooldown and step > end:
                value = self.cooldown.multiplier(value, step - end, phases.cooldown)
            return value

        return multiplier

    def phases(self, run: Horizon) -> Phases:
        """Convert the lengths of the parts into optimizer steps.

        Args:
            run: Length of the run.

        Raises:
            ValueError: The parts are longer than the run, or need a length that ``run`` does not have.
        """
        total = run.total_steps
        if self.needs_total and total is None:
            raise ValueError(
                f"{self} needs the length of the run, and nothing bounds it. Give the Trainer `max_steps`, or a "
                "dataset whose length is known together with `max_epochs`; or use a schedule that needs no length: "
                "`constant` with its warmup in steps."
            )
        warmup, hold, cooldown = (part.steps(run) for part in (self.warmup.duration, self.hold, self.cooldown.duration))
        if total is None:
            return Phases(warmup, hold, 0, 0)
        if warmup + hold + cooldown > total:
            if not (run.is_trial or self._is_rounded_up()):
                given = f"warmup of {warmup} steps is"
                if warmup <= total:
                    given = f"warmup, hold and cooldown of {warmup} + {hold} + {cooldown} steps are"
                raise ValueError(
                    f"{self}: the {given} longer than the run of {total} optimizer steps. Shorten it, or write it as a "
                    "share of the run, for instance '5%'."
                )
            warmup, hold, cooldown = _scaled((warmup, hold, cooldown), total)
        return Phases(warmup, hold, total - warmup - hold - cooldown, cooldown)

    def notes(self, run: Horizon) -> list[str]:
        """Return sentences about parts of the schedule that have no effect in a run of this length."""
        return []

    def _is_rounded_up(self) -> bool:
        """Whether the phases are shares that fit in any run, and only a run of a few steps has no room for all."""
        phases = [phase for phase in (self.warmup.duration, self.hold, self.cooldown.duration) if phase]
        return all(phase.is_relative for phase in phases) and sum(phase.amount for phase in phases) <= 100

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(_arguments(self))})"


def _scaled(phases: tuple[int, int, int], total: int) -> tuple[int, int, int]:
    """Phases in the same proportions that fill ``total`` steps; the warmup is rounded up."""
    warmup, hold, cooldown = phases
    together = sum(phases)
    warmup = min(math.ceil(warmup * total / together), total)
    cooldown = min(math.floor(cooldown * total / together), total - warmup)
    return warmup, total - warmup - cooldown if hold else 0, cooldown


def _overrides_call(schedule: Schedule) -> bool:
    return type(schedule).__call__ is not Schedule.__call__


def _arguments(schedule: Schedule) -> Iterator[str]:
    """The arguments that differ from their defaults, as they are written."""
    for name, parameter in inspect.signature(type(schedule)).parameters.items():
        written = _written(getattr(schedule, name))
        if written != _written(parameter.default):
            yield f"{name}={written}"


def _written(value: Any) -> str:
    if isinstance(value, Duration) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value).removesuffix(" steps") if _is_steps(value) else repr(str(value))
    if isinstance(value, Warmup | Cooldown):
        return _written(value.length) if value == type(value)(value.length) else repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value)


def _is_steps(value: int | Duration) -> bool:
    return not isinstance(value, Duration) or value.unit == "steps"


def _durations(value: Any) -> Iterator[Duration]:
    """Every duration in a nest of attributes."""
    if isinstance(value, Duration):
        yield value
    elif isinstance(value, Warmup | Cooldown):
        yield value.duration
    elif isinstance(value, dict):
        yield from (duration for part in value.values() for duration in _durations(part))
    elif isinstance(value, list | tuple):
        yield from (duration for part in value for duration in _durations(part))
