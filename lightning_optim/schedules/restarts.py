"""Cosine with warm restarts."""

from __future__ import annotations

import math

from lightning_optim.core.durations import Duration
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Position, Schedule
from lightning_optim.schedules.phases import COOLDOWN_SHAPES, Cooldown, Warmup, check_final


@typed
class CosineRestarts(Schedule):
    """Half a cosine from the peak to ``final``, repeated.

    Either ``cycles`` cycles fill the run, or the first cycle has the length ``cycle`` and cycles are repeated to the
    end of the run, whose length need not be known.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        cycles: Number of cycles in the run, at least 1; None for 4, unless ``cycle`` is given.
        cycle: Length of the first cycle; None if ``cycles`` fill the run.
        length_multiplier: Length of each cycle over that of the cycle before, at least 1.
        peak_multiplier: Peak of each cycle over that of the cycle before, in (0, 1].
        final: Multiplier at the end of each cycle.
        hold: Length of a phase at the peak after the warmup.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        final_lr: Learning rate at the end of each cycle, the same for every group, in place of ``final``.

    Raises:
        ValueError: Both ``cycles`` and ``cycle`` are given, or an argument is out of its range.

    References:
        Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983

    Example:
        >>> [CosineRestarts(cycles=2)(step, 100) for step in (0, 25, 50, 75, 100)]
        [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        cycles: int | None = None,
        cycle: int | str | Duration | None = None,
        length_multiplier: float = 1.0,
        peak_multiplier: float = 1.0,
        final: float = 0.0,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        final_lr: float | None = None,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
        if cycles is not None and cycle is not None:
            raise ValueError(
                f"CosineRestarts takes cycles={cycles!r}, which fill the run, or cycle={cycle!r}, the length of the "
                "first; not both."
            )
        if cycles is not None and cycles < 1:
            raise ValueError(f"Invalid cycles={cycles!r} of CosineRestarts: must be at least 1.")
        if not (math.isfinite(length_multiplier) and length_multiplier >= 1):
            raise ValueError(f"Invalid length_multiplier={length_multiplier!r} of CosineRestarts: must be at least 1.")
        if not 0 < peak_multiplier <= 1:
            raise ValueError(f"Invalid peak_multiplier={peak_multiplier!r} of CosineRestarts: must be in (0, 1].")
        self.cycles = 4 if cycles is None and cycle is None else cycles
        self.cycle = None if cycle is None else Duration.parse(cycle)
        if self.cycle is not None and not self.cycle:
            raise ValueError(f"Invalid cycle={cycle!r} of CosineRestarts: must be above 0.")
        self.length_multiplier = float(length_multiplier)
        self.peak_multiplier = float(peak_multiplier)
        self.final = float(final)
        self.final_lr = final_lr
        check_final(self)

    @property
    def shape_needs_total(self) -> bool:  # type: ignore[override]
        """Whether cycles fill the run and therefore depend on its length."""
        return self.cycle is None

    def shape(self, at: Position) -> float:
        """Compute the cosine of the cycle that contains ``at``."""
        growth = self.length_multiplier
        step = at.step
        if self.cycle is not None:
            length: float = self.cycle.steps(at.run)
            if self.cycle.unit == "epochs" and at.run.epoch_ends:  # Cycles end where epochs do.
                began, now = at.run.epochs_at(at.start), at.run.epochs_at(at.start + at.step)
                assert began is not None
                assert now is not None
                step, length = now - began + 1e-9, self.cycle.amount
        else:
            assert self.cycles is not None
            if at.step >= at.length:  # This is the end of the last cycle, not the start of another.
                return self.final
            share = self.cycles if growth == 1 else (growth**self.cycles - 1) / (growth - 1)
            length = at.length / share
        index, into = _locate(step, length, growth)
        if self.cycles is not None and index >= self.cycles:  # Rounding errors can lead here.
            return self.final
        peak = self.peak_multiplier**index
        return self.final + (peak - self.final) * COOLDOWN_SHAPES["cosine"](min(into, 1.0))


def _locate(step: float, length: float, growth: float) -> tuple[int, float]:
    """Return the index of the cycle that contains ``step``, and the fraction of the cycle that has passed."""
    if growth == 1:
        index = int(step // length)
        return index, step / length - index
    index, start = 0, 0.0
    while step >= start + length:
        start += length
        length *= growth
        index += 1
    return index, (step - start) / length
