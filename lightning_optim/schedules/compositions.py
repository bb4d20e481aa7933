"""Schedules with an established name that are another schedule with different defaults."""

from __future__ import annotations

from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.core.typed import typed
from lightning_optim.schedules.base import Phases, Position
from lightning_optim.schedules.phases import COOLDOWN_SHAPES, Cooldown, Warmup
from lightning_optim.schedules.shapes import Constant, Cosine


@typed
class OneCycle(Cosine):
    """One cycle: a cosine up from 1/25 of the peak, then a cosine down to nearly 0.

    Args:
        warmup: Length of the rise, which starts at 1/25 of the peak; or a `Warmup`.
        final: Multiplier reached at the end of the run.
        hold: Length of a phase at the peak.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.
        three_phase: Whether the schedule first falls to the start of the warmup, in as many steps as the warmup took,
            and then to ``final`` in the rest of the run, as in the paper and in torch's
            ``OneCycleLR(three_phase=True)``.
        final_lr: Learning rate reached at the end, the same for every group, in place of ``final``.

    Raises:
        ValueError: ``three_phase`` is set and the warmup has no length or no start; or, when the schedule is called,
            the second phase is longer than the rest of the run.

    References:
        Smith & Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120. The momentum that moves in the
        opposite direction is a schedule of ``momentum``, see `OptimizerFactory`.

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
                f"Invalid warmup={warmup!r} of OneCycle with three_phase=True: must have a length and a start, to "
                "which the second phase returns, for instance Warmup('30%', 'cosine', start=0.04)."
            )

    def phases(self, run: Horizon) -> Phases:
        """Convert the lengths of the parts into optimizer steps, as `Schedule.phases` does.

        Args:
            run: Length of the run.

        Returns:
            The lengths in optimizer steps.

        Raises:
            ValueError: The phases do not fit into the run, or the second of three phases does not.
        """
        phases = super().phases(run)
        if self.three_phase and phases.shape < phases.warmup and not run.is_trial:
            raise ValueError(
                f"{self}: the second phase, of {phases.warmup} steps as the warmup, does not fit into the "
                f"{phases.shape} steps after the warmup. Give a warmup of less than half of the run."
            )
        return phases

    def shape(self, at: Position) -> float:
        """Half a cosine to ``final``; with ``three_phase`` half a cosine to the start of the warmup, and a second one.

        Args:
            at: Position in the shape.
        """
        if not self.three_phase:
            return super().shape(at)
        start = self.warmup.start or 0.0
        if at.step < at.warmup:
            return start + (1 - start) * COOLDOWN_SHAPES["cosine"](at.step / at.warmup)
        rest = at.length - at.warmup
        left = COOLDOWN_SHAPES["cosine"]((at.step - at.warmup) / rest) if rest else 0.0
        return self.final + (start - self.final) * left


@typed
class WSD(Constant):
    """Warmup, stable, decay: the peak throughout, and a cooldown at the end.

    The stable part does not depend on the length of the run, so a run can be continued, or cooled down from any of its
    checkpoints: resume with ``max_steps`` set to the end of the cooldown, its length set here, and
    ``on_resume="config"``.

    Args:
        warmup: Length of the warmup, or a `Warmup`; ``0`` for none.
        cooldown: Length of the decay to 0 by ``1 − sqrt(progress)``; or a `Cooldown`, which may have another shape and
            another final value.
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
