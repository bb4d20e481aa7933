"""Smooth schedules: from 1, right after warmup and hold, to ``final`` at the end of the run, and constant beyond."""

from __future__ import annotations

import math
from abc import abstractmethod

from lightning_optim.core.durations import Duration
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Position, Schedule
from lightning_optim.schedules.phases import COOLDOWN_SHAPES, Cooldown, Warmup, check_final


class Constant(Schedule):
    """Constant multiplier of 1; it does not need the length of the run.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        hold: Has no effect of its own here.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Example:
        >>> schedule = Constant(warmup=4)
        >>> [schedule(step) for step in (0, 1, 3, 4, 1000)]
        [0.25, 0.5, 1.0, 1.0, 1.0]
    """

    shape_needs_total = False

    def shape(self, at: Position) -> float:
        """Return 1."""
        return 1.0


@typed
class Decay(Schedule):
    """Base class of decays from 1 to ``final``; a subclass defines `remaining`.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier reached at the end, at least 0; for a learning rate at most 1. Above 1 the shape rises, as the
            weight decay of DINO does.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``final`` is negative or not finite.
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        final: float = 0.0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        final_lr: float | None = None,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        self.final = float(final)
        self.final_lr = final_lr
        check_final(self)

    def shape(self, at: Position) -> float:
        """1 at the beginning, ``final`` at the end."""
        return self.final + (1 - self.final) * self.remaining(at.progress)

    @abstractmethod
    def remaining(self, progress: float) -> float:
        """Compute the fraction of the decay that is left: 1 at ``progress`` 0, 0 at ``progress`` 1."""


class Linear(Decay):
    """A straight line from 1 to ``final``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier reached at the end of the run.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Example:
        >>> [Linear(final=0.5)(step, 100) for step in (0, 50, 100, 200)]
        [1.0, 0.75, 0.5, 0.5]
    """

    def remaining(self, progress: float) -> float:
        """1 − progress."""
        return COOLDOWN_SHAPES["linear"](progress)


class Cosine(Decay):
    """Half a cosine from 1 to ``final``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier reached at the end of the run. Language models are often trained to 0.1.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    References:
        Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983, equation 5 without restarts.

    Example:
        >>> [Cosine()(step, 100) for step in (0, 50, 100)]
        [1.0, 0.5, 0.0]
        >>> Cosine(warmup="10%", final=0.1)(0, 100)
        0.1
    """

    def remaining(self, progress: float) -> float:
        """(1 + cos(π·progress)) / 2."""
        return COOLDOWN_SHAPES["cosine"](progress)


@typed
class Polynomial(Decay):
    """A power of the remaining fraction of the run, ``(1 − progress) ** power``, scaled to end at ``final``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        power: Exponent, above 0; 1 is a straight line, 0.9 is usual for segmentation.
        final: Multiplier reached at the end of the run.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``power`` is not a finite number above 0.

    Example:
        >>> [Polynomial(power=2)(step, 100) for step in (0, 50, 100)]
        [1.0, 0.25, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        power: float = 1.0,
        final: float = 0.0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        final_lr: float | None = None,
    ) -> None:
        super().__init__(warmup, final, hold, cooldown, final_lr=final_lr)
        if not (math.isfinite(power) and power > 0):
            raise ValueError(f"Invalid power={power!r} of Polynomial: must be finite and above 0; 1 is a line.")
        self.power = float(power)

    def remaining(self, progress: float) -> float:
        """(1 − progress)^power."""
        return float((1 - progress) ** self.power)


@typed
class Exponential(Decay):
    """Exponential decay to ``final``, with equal ratios from step to step.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier reached at the end of the run, above 0. torch's ``gamma`` over ``n`` steps is ``gamma ** n``.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``final`` is not a finite number above 0.

    Example:
        >>> [round(Exponential(final=0.01)(step, 100), 3) for step in (0, 50, 100)]
        [1.0, 0.1, 0.01]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        final: float = 0.01,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        final_lr: float | None = None,
    ) -> None:
        super().__init__(warmup, final, hold, cooldown, final_lr=final_lr)
        if 0 in (self.final, self.final_lr):
            name = "final" if self.final == 0 else "final_lr"
            raise ValueError(f"Invalid {name}=0 of Exponential: must be above 0, because equal ratios never reach 0.")

    def shape(self, at: Position) -> float:
        """final^progress."""
        return float(self.final**at.progress)

    def remaining(self, progress: float) -> float:
        """(final^progress − final) / (1 − final): the fraction of the decay that is left."""
        return (self.final**progress - self.final) / (1 - self.final) if self.final != 1 else 1 - progress


class REX(Decay):
    """Reflected exponential: high for most of the run, then falling ever faster; suited to small budgets.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier reached at the end of the run.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    References:
        Chen et al., REX: Revisiting Budgeted Training with an Improved Schedule, 2021,
        https://arxiv.org/abs/2107.04197

    Example:
        >>> [round(REX()(step, 100), 3) for step in (0, 50, 100)]
        [1.0, 0.667, 0.0]
    """

    def remaining(self, progress: float) -> float:
        """(1 − progress) / (1 − progress/2)."""
        return (1 - progress) / (1 - progress / 2)


@typed
class Tanh(Decay):
    """A hyperbolic tangent: high for most of the run, then a fast fall, then flat; ``tanh`` of timm.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        final: Multiplier at the end of the run, which the curve itself only approaches.
        lower: Argument of the tangent at the start. The lower it is, the closer the curve starts to 1.
        upper: Argument of the tangent at the end, above ``lower``. The higher it is, the closer the curve ends to
            ``final``.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``upper`` is not above ``lower``.

    References:
        Hsueh et al., Stochastic Gradient Descent with Hyperbolic-Tangent Decay on Classification, 2018,
        https://arxiv.org/abs/1806.01593

    Example:
        >>> [round(Tanh()(step, 100), 3) for step in (0, 50, 70, 100)]
        [1.0, 0.982, 0.5, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        final: float = 0.0,
        lower: float = -7.0,
        upper: float = 3.0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        final_lr: float | None = None,
    ) -> None:
        super().__init__(warmup, final, hold, cooldown, final_lr=final_lr)
        if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
            raise ValueError(
                f"Invalid lower={lower!r} and upper={upper!r} of Tanh: must be finite, and upper must be above lower."
            )
        self.lower, self.upper = float(lower), float(upper)

    def remaining(self, progress: float) -> float:
        """(1 − tanh(lower + progress·(upper − lower))) / 2, and 0 at the end."""
        if progress == 1:
            return 0.0
        return (1 - math.tanh(self.lower * (1 - progress) + self.upper * progress)) / 2


@typed
class InverseSqrt(Schedule):
    """The inverse square root of the steps since the warmup; it does not need the length of the run.

    The multiplier is ``1 / sqrt(1 + step / timescale)``. With the default timescale it is the Transformer's
    ``sqrt(warmup / step of the run)``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        timescale: Time after which the multiplier is ``1 / sqrt(2)``, above 0; None for the length of the warmup, or
            10,000 steps if there is no warmup.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    Raises:
        ValueError: ``timescale`` is 0.

    References:
        Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762;
        Zhai et al., Scaling Vision Transformers, 2021, https://arxiv.org/abs/2106.04560 (with a linear cooldown).

    Example:
        >>> [InverseSqrt(warmup=100)(step) for step in (99, 100, 400)]
        [1.0, 1.0, 0.5]
    """

    shape_needs_total = False

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        timescale: int | str | Duration | None = None,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        self.timescale = None if timescale is None else Duration.parse(timescale)
        if self.timescale is not None and not self.timescale:
            raise ValueError(f"Invalid timescale={timescale!r} of InverseSqrt: must be above 0.")

    def shape(self, at: Position) -> float:
        """1 / √(1 + step/timescale)."""
        timescale = at.warmup or 10_000 if self.timescale is None else self.timescale.steps(at.run)
        return 1 / math.sqrt(1 + at.step / timescale)
