"""The phases before and after a schedule's shape: warmup and cooldown."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_optim.core.durations import Duration
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed

COOLDOWN_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Decays by name, each from 1 at progress 0 to 0 at progress 1."""

_RISES = ("linear", "cosine", "exponential", "constant")
_EXPONENTIAL_START = 0.01


class _Phase:
    @property
    def duration(self) -> Duration:
        """The length, which the constructor has parsed."""
        length = vars(self)["length"]
        assert isinstance(length, Duration)
        return length

    def __repr__(self) -> str:
        absent = [key for key in ("start_lr", "final_lr") if vars(self).get(key) is None]
        rest = [f"{key}={value!r}" for key, value in vars(self).items() if key not in ("length", *absent)]
        return f"{type(self).__name__}({', '.join([repr(str(vars(self)['length'])), *rest])})"


@typed
@dataclass(frozen=True, repr=False)
class Warmup(_Phase):
    """Warmup: the rise of a schedule to the peak.

    Without ``start``, ``n`` steps of a linear warmup use 1/n, 2/n, ..., n/n: the first update never uses the full rate,
    nor a rate of zero, and the last one of the warmup uses the peak. With ``start`` the first update uses that
    fraction, and the first one after the warmup uses the peak, as in torch's ``LinearLR``, timm and (``start=0``)
    Hugging Face.

    Args:
        length: Length of the warmup: ``500``, ``"500 steps"``, ``"2 epochs"`` or ``"5%"`` of the run.
        shape: ``"linear"``, ``"cosine"``, ``"exponential"`` (equal ratios, from 0.01 if no start is given) or
            ``"constant"`` (stays at ``start``, then jumps to the peak).
        start: Fraction of the peak to start from, in [0, 1); None to start one step above zero.
        start_lr: Learning rate to start from, the same for every group, in place of ``start``.

    Raises:
        ValueError: The length cannot be parsed, the shape is unknown, the start does not fit it or is given twice.

    Example:
        >>> [Warmup(4).multiplier(step, 4) for step in range(4)]
        [0.25, 0.5, 0.75, 1.0]
        >>> [Warmup(4, start=0.5).multiplier(step, 4) for step in range(4)]
        [0.5, 0.625, 0.75, 0.875]
    """

    length: int | str | Duration = 0
    shape: str = "linear"
    start: float | None = None
    start_lr: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", Duration.parse(self.length))
        if self.shape not in _RISES:
            raise ValueError(f"Unknown warmup shape {self.shape!r}. {nearest(self.shape, _RISES)}")
        check_rate(self, "start_lr")
        if self.start_lr is not None:
            if self.start is not None:
                raise ValueError(
                    f"Warmup takes start={self.start!r}, a fraction of the peak, or start_lr={self.start_lr!r}, a "
                    "learning rate; not both."
                )
            if self.shape == "exponential" and not self.start_lr:
                raise ValueError("Invalid start_lr=0 of an exponential warmup: must be above 0; equal ratios keep 0.")
        elif self.start is None:
            if self.shape == "constant":
                raise ValueError(
                    "Invalid start=None of a constant warmup: must be a fraction of the peak, for instance start=0.1."
                )
        elif not 0 <= self.start < 1 or (self.shape == "exponential" and self.start == 0):
            lowest = "(0" if self.shape == "exponential" else "[0"
            raise ValueError(
                f"Invalid start={self.start!r} of a {self.shape} warmup: must be a fraction of the peak in "
                f"{lowest}, 1)."
            )

    def for_peak(self, peak: float) -> Warmup:
        """Return this warmup with ``start_lr`` as a fraction of ``peak``, which is above 0."""
        if self.start_lr is None:
            return self
        start = min(self.start_lr / peak, math.nextafter(1.0, 0.0))  # A group added later may have a smaller rate.
        return replace(self, start=start, start_lr=None)

    def multiplier(self, step: float, steps: int) -> float:
        """Compute the fraction of the peak at ``step`` of a warmup of ``steps`` steps."""
        start = self.start or 0.0
        progress = min((step + 1) / steps, 1.0) if self.start is None else step / steps
        if self.shape == "constant":
            return start
        if self.shape == "exponential":
            return float((start or _EXPONENTIAL_START) ** (1 - progress))
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (1 - start) * progress


@typed
@dataclass(frozen=True, repr=False)
class Cooldown(_Phase):
    """Cooldown: a decay over the last part of the run, from the value that the schedule's shape has reached.

    Args:
        length: Length of the cooldown, counted back from the end of the run.
        shape: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``, the best of those compared in the reference.
        final: Multiplier of the peak reached at the end of the run, at least 0.
        final_lr: Learning rate reached there, the same for every group, in place of ``final``.

    Raises:
        ValueError: The length cannot be parsed, the shape is unknown, or ``final`` is negative, not finite, or given
            together with ``final_lr``.

    References:
        Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024,
        https://arxiv.org/abs/2405.18392

    Example:
        >>> Cooldown("20%", "linear").multiplier(1.0, step=5, steps=20)
        0.75
    """

    length: int | str | Duration = 0
    shape: str = "1-sqrt"
    final: float = 0.0
    final_lr: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", Duration.parse(self.length))
        if self.shape not in COOLDOWN_SHAPES:
            raise ValueError(f"Unknown cooldown shape {self.shape!r}. {nearest(self.shape, COOLDOWN_SHAPES)}")
        check_final(self)

    def for_peak(self, peak: float) -> Cooldown:
        """Return this cooldown with ``final_lr`` as a multiplier of ``peak``, which is above 0."""
        return self if self.final_lr is None else replace(self, final=self.final_lr / peak, final_lr=None)

    def multiplier(self, stable: float, step: float, steps: int) -> float:
        """Compute the multiplier at ``step`` of a cooldown of ``steps`` steps that begins at ``stable``."""
        return self.final + (stable - self.final) * COOLDOWN_SHAPES[self.shape](min(step / steps, 1.0))


def check_final(owner: Any) -> None:
    """Check ``final`` and ``final_lr`` of a schedule or phase.

    Args:
        owner: The schedule or phase.

    Raises:
        ValueError: One of them is negative or not finite, or both are given.
    """
    final = owner.final
    check_rate(owner, "final_lr")
    default = inspect.signature(type(owner)).parameters.get("final")
    if owner.final_lr is not None and default is not None and final != default.default:
        raise ValueError(
            f"{type(owner).__name__} takes final={final!r}, a multiplier of the peak, or final_lr={owner.final_lr!r}, "
            "a learning rate; not both."
        )
    if not (math.isfinite(final) and final >= 0):
        raise ValueError(
            f"Invalid final={final!r} of {type(owner).__name__}: must be a multiplier of the peak, finite and at least "
            "0; for a learning rate it must be in [0, 1]."
        )


def check_rate(owner: Any, name: str) -> None:
    """Check a learning rate of a schedule or phase.

    Args:
        owner: The schedule or phase.
        name: Name of its attribute, whose value is None if no rate is given.

    Raises:
        ValueError: The rate is negative or not finite.
    """
    rate = getattr(owner, name)
    if rate is not None and not (math.isfinite(rate) and rate >= 0):
        raise ValueError(
            f"Invalid {name}={rate!r} of {type(owner).__name__}: must be a learning rate, finite and at least 0."
        )
