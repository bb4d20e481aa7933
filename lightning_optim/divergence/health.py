"""Health of single parameters and groups, inspected at logging steps: dead, stalled, vanishing, exploding."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_optim.core.stateful import Stateful
from lightning_optim.core.stats import TENSOR_COLUMNS
from lightning_optim.divergence.alarms import Alarm, alarm

_HISTORY = 10
_INSPECTIONS = 5
"""Number of inspections that advice about the learning rate is based on."""
_APART = 10
"""Smallest number of steps between two of these, as measured: gradients of neighbouring steps are much alike."""
_NEAR_PEAK = 0.1
"""Share of its highest learning rate below which a schedule is near its end, so that small updates are intended."""
_USUAL_RATIO = 0.01
"""Share of the weights below which an update is no sign of a high learning rate."""


@dataclass(frozen=True)
class HealthLimits:
    """Limits beyond which a parameter or group is reported.

    Figures called "measured" are those of `tests/benchmarks/calibration.py`: five small real trainings at rates
    from a hundredth to a hundred times a good one, of which 62 in 135 end well; all are in the documentation.

    Args:
        warmup: Number of optimizer steps before the first report, because weights that start at zero pass on no
            gradient at first.
        vanishing: Root mean square of a gradient below this share of the largest one's. Measured: one good run is
            reported, at three times the best rate, and 6 of 33 at too high a rate.
        exploding: Gradient norm of a group above this many times its median over the last 10 inspections. Measured:
            98 % of the good runs stay below 5, all below 30.
        stalled: Update below this share of the weights, at a learning rate near its highest. Measured: good runs keep
            every tensor above about 1e-8; a tenth of the bad ones fall below the limit.
        below_eps: Share of the elements with a gradient whose second moment is below ``eps``, so that ``eps`` alone
            sets their update. Not calibrated: good runs stay far below it.
        high_ratio: Update above this share of the weights, at 5 consecutive inspections; 1e-3 is usual. Measured: no
            good run is reported, and no other run either, because runs at far too high a rate fail before that and are
            reported by other limits.
        low_ratio: Update below this share of the weights, at a steady rate. Measured: no good run is reported, and 3 of
            40 at too low a rate.
        against: Mean cosine of gradient and momentum over 5 inspections below this, and each cosine below half of it:
            steps oscillate across a valley. Measured: 2 of 53 good runs are reported, and 6 of 24 at too high a rate.
        along: Cosine of gradient and momentum above this at 5 consecutive inspections, at a steady rate and with
            updates below 0.01 of the weights: gradients keep the direction of the steps, so longer steps would be
            possible. Measured: 2 of 53 good runs are reported, and 18 of 31 at too low a rate.
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


class ParameterHealth(Stateful):
    """Inspection of the parameters of one optimizer at logging steps.

    A parameter or group is reported once, and again only after it has been healthy in between.

    Args:
        limits: Limits beyond which it is reported; None for the defaults.
    """

    # These are keys in checkpoints, and so stay: `told` is what was reported, `looked` the step of the last advice.
    STATE = ("told", "norms", "ratios", "cosines", "rates", "peaks", "looked")

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self.limits = limits or HealthLimits()
        self._told: set[tuple[str, str]] = set()
        self._norms: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._peaks: dict[str, float] = {}
        self._ratios: deque[float] = deque(maxlen=_INSPECTIONS)
        self._cosines: deque[float] = deque(maxlen=_INSPECTIONS)
        self._rates: deque[float] = deque(maxlen=_INSPECTIONS)
        self._looked = -_APART

    def update(
        self,
        step: int,
        values: Sequence[float],
        names: Sequence[str],
        numel: Sequence[int],
        groups: Sequence[tuple[str, float, int]],
        without: Sequence[str],
        alive: Sequence[bool] = (),
    ) -> list[Alarm]:
        """Inspect the statistics of each tensor in one step.

        Args:
            step: Number of optimizer steps so far.
            values: `StepRecord.per_tensor`, row by row: [tensors * columns] numbers.
            names: Name of each tensor.
            numel: Number of elements of each tensor.
            groups: Name, learning rate and number of tensors of each group.
            without: Names of parameters of the optimizer that have no gradient.
            alive: Whether each tensor had a gradient other than 0 at the first step; empty if that is not known.

        Returns:
            One alarm for each kind of new findings, with the names concerned.
        """
        width = len(TENSOR_COLUMNS)
        rows = [dict(zip(TENSOR_COLUMNS, values[i * width : (i + 1) * width], strict=True)) for i in range(len(names))]
        if step < self.limits.warmup or not all(math.isfinite(row["grad_sq"]) for row in rows):
            return []
        found: dict[str, list[str]] = {"no_gradient": list(without), "dead": [], "vanishing": [], "stalled": []}
        largest = max((_rms(row["grad_sq"], n) for row, n in zip(rows, numel, strict=True)), default=0.0)
        at = 0
        exploding = []
        for group, lr, size in groups:
            part = range(at, at + size)
            at += size
            near_peak = self._near_peak(group, lr)
            for i in part:
                self._inspect(rows[i], f"{names[i]} (group {group})", numel[i], largest, near_peak, found)
            if self._explodes(group, math.sqrt(sum(rows[i]["grad_sq"] for i in part))):
                exploding.append(f"group {group}")
        found["exploding"] = exploding
        text = {
            "no_gradient": "no gradient at all in",
            "dead": "the gradient is exactly 0 in",
            "vanishing": "the gradient has all but vanished in",
            "stalled": "updates are too small to matter in",
            "exploding": f"the gradient norm is over {self.limits.exploding:g} times its median in",
        }
        known = len(alive) == len(names)
        died = [known and alive[i] and row["grad_sq"] == 0 for i, row in enumerate(rows)]
        most = not all(died) and 2 * sum(n for n, dead in zip(numel, died, strict=True) if dead) > sum(numel)
        alarms = []
        for kind, which in found.items():
            new = [name for name in which if (kind, name) not in self._told]
            self._told = {(k, n) for k, n in self._told if k != kind} | {(kind, name) for name in which}
            if new:
                shown = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
                alarms.append(alarm(kind, step, f"{text[kind]} {shown}", tuple(new), most=most and kind == "dead"))
        return [*alarms, *self._advise(step, rows, groups)]

    def _inspect(
        self, row: dict[str, float], name: str, numel: int, largest: float, near_peak: bool, found: dict[str, list[str]]
    ) -> None:
        limits = self.limits
        if row["grad_sq"] == 0:
            found["dead"].append(name)
        elif _rms(row["grad_sq"], numel) < limits.vanishing * largest:
            found["vanishing"].append(name)
        still = near_peak and row["update_sq"] < limits.stalled**2 * row["param_sq"]
        # Rows of an embedding that no batch has used yet have no second moment either.
        moving = numel - row["zero_grad"]
        set_by_eps = row["below_eps"] - row["zero_grad"] > limits.below_eps * moving
        if row["grad_sq"] > 0 and (still or set_by_eps):
            found["stalled"].append(name)

    def _near_peak(self, group: str, lr: float) -> bool:
        peak = self._peaks[group] = max(lr, self._peaks.get(group, 0.0))
        return lr > 0 and lr >= _NEAR_PEAK * peak

    def _explodes(self, group: str, norm: float) -> bool:
        history = self._norms[group]
        explodes = len(history) == _HISTORY and norm > self.limits.exploding * statistics.median(history)
        history.append(norm)
        return explodes

    def _advise(self, step: int, rows: list[dict[str, float]], groups: Sequence[tuple[str, float, int]]) -> list[Alarm]:
        if step < self._looked + _APART:
            return []
        self._looked = step
        limits = self.limits
        # A sum is NaN where the rule has no such quantity.
        total = {key: sum(row[key] for row in rows) for key in TENSOR_COLUMNS}
        if total["param_sq"] > 0:
            self._ratios.append(math.sqrt(total["update_sq"] / total["param_sq"]))
        if (scale := total["clipped_sq"] * total["momentum_sq"]) > 0:
            self._cosines.append(total["grad_exp_avg"] / math.sqrt(scale))
        self._rates.append(max((lr for _, lr, _ in groups), default=0.0))
        peak = max(self._peaks.values(), default=0.0)
        steady = self._rates[-1] <= self._rates[0] and self._rates[-1] >= _NEAR_PEAK * peak  # A warmup is not steady.
        ratios = self._ratios if len(self._ratios) == _INSPECTIONS else None
        cosine = statistics.fmean(self._cosines) if len(self._cosines) == _INSPECTIONS else 0.0
        advice: dict[str, str] = {}
        if ratios and min(ratios) > limits.high_ratio:
            advice["lr_too_high"] = f"steps change the weights by more than {limits.high_ratio:g} of their norm"
        elif cosine < limits.against and max(self._cosines) < limits.against / 2:
            advice["lr_too_high"] = "gradients point against the momentum, so the steps oscillate"
        elif ratios and steady and max(ratios) < limits.low_ratio:
            advice["lr_too_low"] = f"steps change the weights by less than {limits.low_ratio:g} of their norm"
        elif ratios and steady and max(ratios) < _USUAL_RATIO and cosine > 0 and min(self._cosines) > limits.along:
            advice["lr_too_low"] = "gradients keep pointing along the momentum, so longer steps would still descend"
        new = {kind: text for kind, text in advice.items() if (kind, "") not in self._told}
        self._told = {(k, n) for k, n in self._told if n != ""} | {(kind, "") for kind in advice}
        return [alarm(kind, step, text) for kind, text in new.items()]

    def rolled_back(self) -> None:
        """Forget what has been reported, because it concerned weights that no longer exist."""
        self._told.clear()


def _rms(square_sum: float, numel: int) -> float:
    return math.sqrt(square_sum / max(numel, 1))
