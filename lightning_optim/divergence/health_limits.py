"""Limits of the inspection of single parameters, and how they were measured."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim.core.typed import typed


@typed
@dataclass(frozen=True)
class HealthLimits:
    """Limits beyond which a parameter or group is reported.

    Figures called "measured" are those of `tests/benchmarks/calibration.py`: five small real trainings at rates
    from a hundredth to a hundred times a good one, of which 61 in 135 end well; all are in the documentation.

    Args:
        warmup: Number of optimizer steps before the first report, because weights that start at zero pass on no
            gradient at first.
        vanishing: Root mean square of a gradient below this share of the largest one's. Measured: 0 of 61
            good runs are reported, and 2 of 33 at too high a rate.
        exploding: Gradient norm of a group above this many times its median over the last 10 inspections. Measured: 0
            of 61 good runs are reported, and 1 of 33 at too high a rate; 98 % of the good ones stay below 5.
        stalled: Update below this share of the weights, at a learning rate near its highest. Measured: none
            of 61 good runs is reported; 95 % of them keep every tensor above 1e-8, and a third of the bad ones do not
            keep above the limit.
        below_eps: Share of the elements with a gradient whose second moment is below ``eps``, so that ``eps`` alone
            sets their update. Not calibrated: good runs stay far below it.
        high_ratio: Update above this share of the weights, at 5 consecutive inspections; 1e-3 is usual. Measured: no
            run is reported, because runs at far too high a rate fail before that and are reported by other limits.
        low_ratio: Update below this share of the weights, at a steady rate. Measured: 0 of the good runs
            are beyond it, and 3 of 41 at too low a rate.
        against: Mean cosine of gradient and momentum over 5 inspections below this, and each cosine below half of it:
            steps oscillate across a valley. Measured, with ``high_ratio``: 0 of 61 good runs are reported, and 5 of 33
            at too high a rate.
        along: Cosine of gradient and momentum above this at 5 consecutive inspections, at a steady rate and with
            updates below 0.01 of the weights: gradients keep the direction of the steps, so longer steps would be
            possible. Measured, with ``low_ratio``: 1 of 61 good runs are reported, and 13 of 41 at too low a rate.
    """

    warmup: int = 20
    vanishing: float = 1e-6
    exploding: float = 30.0
    stalled: float = 1e-10
    below_eps: float = 0.9
    high_ratio: float = 0.1
    low_ratio: float = 1e-5
    against: float = -0.4
    along: float = 0.4

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(
                f"Invalid warmup={self.warmup!r} of HealthLimits: must be a number of steps of at least 0."
            )
        for name in ("vanishing", "exploding", "stalled", "below_eps", "high_ratio", "low_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Invalid {name}={getattr(self, name)!r} of HealthLimits: must be at least 0.")
        for name in ("against", "along"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"Invalid {name}={getattr(self, name)!r} of HealthLimits: must be a cosine, from -1 to 1."
                )
