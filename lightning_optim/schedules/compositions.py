"""Schedules known by a name of their own that are another one with other defaults."""

from __future__ import annotations

from lightning_optim.durations import Duration
from lightning_optim.schedules.phases import Cooldown, Warmup
from lightning_optim.schedules.shapes import Constant, Cosine


class OneCycle(Cosine):
    """Up by a cosine from 1/25 of the peak, then down by a cosine to nearly nothing.

    Args:
        warmup: Length of the way up, which starts at 1/25 of the peak; or a `Warmup`.
        final: Multiplier reached at the end of the run.
        hold: How long to stay at the peak.
        cooldown: Length of a final decay to 0, or a `Cooldown`; ``0`` for none.

    References:
        Smith & Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120. The momentum that goes down and up the
        other way round is a schedule of ``momentum``, see `OptimizerFactory`.

    Example:
        >>> [round(OneCycle()(step, 100), 3) for step in (0, 15, 30, 65, 100)]
        [0.04, 0.52, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        warmup: int | str | Duration | Warmup = "30%",
        final: float = 4e-6,
        hold: int | str | Duration = 0,
        cooldown: int | str | Duration | Cooldown = 0,
    ) -> None:
        if not isinstance(warmup, Warmup):
            warmup = Warmup(warmup, "cosine", start=0.04)
        super().__init__(warmup, final, hold, cooldown)


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
