"""Schedules known by a name of their own that are another one with other defaults."""

from __future__ import annotations

from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.schedules.base import Phases, Position
from lightning_optim.schedules.phases import COOLDOWN_SHAPES, Cooldown, Warmup
from lightning_optim.schedules.shapes import Constant, Cosine


class OneCycle(Cosine):
    """Up by a cosine from 1/25 of the peak, then down by a cosine to nearly nothing.

    Args:
        warmup: Length of the way up, which starts at 1/25 of the peak; or a `Warmup`.
        final: Multiplier reached at the end of the run.
        hold: How long to stay at the peak.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        three_phase: Down to where the warmup started in as many steps as the warmup took, and from there to ``final``
            in the rest of the run, as the paper has it and torch's ``OneCycleLR(three_phase=True)``.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``three_phase`` is to go back to a start that the warmup does not have; or (when called) the way
            down is longer than what is left of the run.

    References:
        Smith & Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120. The momentum that goes down and up the
        other way round is a schedule of ``momentum``, see `OptimizerFactory`.

    Example:
        >>> [round(OneCycle()(step, 100), 3) for step in (0, 15, 30, 65, 100)]
        [0.04, 0.52, 1.0, 0.5, 0.0]
        >>> [round(OneCycle(three_phase=True)(step, 100), 3) for step in (0, 30, 60, 80, 100)]
        [0.04, 1.0, 0.04, 0.02, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = "30%",
        final: float = 4e-6,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
        *,
        three_phase: bool = False,
        final_lr: float | None = None,
    ) -> None:
        if not isinstance(warmup, Warmup):
            warmup = Warmup(warmup, "cosine", start=0.04)
        super().__init__(warmup, final, hold, cooldown, final_lr=final_lr)
        self.three_phase = three_phase
        if three_phase and (not warmup.length or (warmup.start is None and warmup.start_lr is None)):
            raise ValueError(
                f"three_phase=True of OneCycle goes back to where the warmup started, in as many steps, got {warmup!r}."
                " Give it a length and a start, for instance Warmup('30%', 'cosine', start=0.04)."
            )

    def phases(self, run: Horizon) -> Phases:
        """Convert the lengths of the parts into optimizer steps, as `Schedule.phases` does.

        Raises:
            ValueError: As there, or the run is too short for the second of three phases.
        """
        phases = super().phases(run)
        if self.three_phase and phases.shape < phases.warmup and not run.is_trial:
            raise ValueError(
                f"{self}: down again in the {phases.warmup} steps that the warmup took does not fit into the "
                f"{phases.shape} steps left after it. Give a warmup of less than half of the run."
            )
        return phases

    def shape(self, at: Position) -> float:
        """Half a cosine down to ``final``; with ``three_phase`` first to the start of the warmup, then to ``final``."""
        if not self.three_phase:
            return super().shape(at)
        start = self.warmup.start or 0.0
        if at.step < at.warmup:
            return start + (1 - start) * COOLDOWN_SHAPES["cosine"](at.step / at.warmup)
        rest = at.length - at.warmup
        left = COOLDOWN_SHAPES["cosine"]((at.step - at.warmup) / rest) if rest else 0.0
        return self.final + (start - self.final) * left


class WSD(Constant):
    """Warmup, stable, decay: the peak throughout, and a cooldown at the end.

    The stable part does not depend on the length of the run, so one run can be trained on and cooled down from any of
    its checkpoints: resume with ``max_steps`` set to where the cooldown ends, its length here, and
    ``on_resume="config"``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        cooldown: Length of the decay to 0 by ``1 − sqrt(progress)``; or a `Cooldown`, which may be linear or a cosine,
            and end elsewhere.
        hold: Has no effect of its own here.

    References:
        Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395;
        Hägele et al., 2024, https://arxiv.org/abs/2405.18392 (1 − sqrt, and 20 % as a good length).

    Example:
        >>> [WSD(warmup=10)(step, 100) for step in (0, 10, 80, 85, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = 0,
        cooldown: int | str | Duration | Cooldown = "20%",
        hold: int | str | Duration = 0,
    ) -> None:
        super().__init__(warmup, hold, cooldown)
