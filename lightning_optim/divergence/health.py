"""Health of single parameters and groups, inspected at logging steps: dead, stalled, vanishing, exploding."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.core.stateful import Stateful
from lightning_optim.divergence.alarms import Alarm, alarm
from lightning_optim.divergence.clip_rate import ClipRate
from lightning_optim.divergence.gradient_history import GradientHistory
from lightning_optim.divergence.health_limits import HealthLimits
from lightning_optim.divergence.inspection import Inspection
from lightning_optim.divergence.parameter_map import ParameterMap
from lightning_optim.divergence.rate_advice import NEAR_PEAK, RateAdvice

_HISTORY = 10
_GROWN = 10.0
"""Factor on the first gradient of a parameter beyond which it is growing, not vanishing."""
_FALLEN = 1e-3
"""Share of the largest gradient of a parameter below which it is small because training has made it so."""


class ParameterHealth(Stateful):
    """Inspection of the parameters of one optimizer at logging steps.

    What is found in one step has to be confirmed: by the steps before it (`GradientHistory`), by the parameters next to
    it (`ParameterMap`), or by the next inspection. Each parameter or group is reported once in a run for each kind of
    finding; a rollback starts anew.

    Args:
        limits: Limits beyond which a parameter is reported; None for the defaults.
        parameters: Relations between the parameters; None if they are not known.
        history: What the steps so far show; None if that is not known, so that the inspected step has to do.
    """

    # These are keys in checkpoints, and so stay: `told` is what was reported.
    STATE = ("told", "norms", "peaks", "still", "most")
    PARTS = ("clip_rate",)

    def __init__(
        self,
        limits: HealthLimits | None = None,
        parameters: ParameterMap | None = None,
        history: GradientHistory | None = None,
    ) -> None:
        self.limits = limits or HealthLimits()
        self.parameters = parameters or ParameterMap()
        self.history = history
        self.clip_rate = ClipRate()
        self._told: set[tuple[str, str]] = set()
        self._norms: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._peaks: dict[str, float] = {}
        self._advice = RateAdvice(self.limits)
        self._still: tuple[str, ...] = ()
        """Names of the parameters with hardly any update at the last inspection."""
        self._most = False
        """Whether most of the network was dead at the last inspection."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the advice on the learning rate among its keys."""
        return {**super().state_dict(), **self._advice.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; checkpoints of version 0.1 have less."""
        of_advice = state.keys() & set(RateAdvice.STATE)
        self._advice.load_state_dict({key: state[key] for key in of_advice})
        own = {key: value for key, value in state.items() if key not in of_advice}
        super().load_state_dict({"still": (), "most": False, "clip_rate": {}, **own})

    def update(self, seen: Inspection) -> list[Alarm]:
        """Inspect the statistics of each tensor in one step.

        Args:
            seen: The inspection.

        Returns:
            One alarm for each kind of new findings, with the names concerned.
        """
        rows = seen.rows()
        if seen.step < self.limits.warmup or not all(math.isfinite(row["grad_sq"]) for row in rows):
            return []
        if self.history is not None:
            self.history.reserve(max(seen.places, default=len(rows) - 1) + 1)
        group_of: list[str] = []
        exploding, near_peak = [], []
        for group, lr, size in seen.groups:
            part = rows[len(group_of) : len(group_of) + size]
            group_of += [group] * size
            near_peak += [self._near_peak(group, lr)] * size
            if self._explodes(group, math.sqrt(sum(row["grad_sq"] for row in part))) and not self._has_converged():
                exploding.append(f"group {group}")
        labels = [f"{name} (group {group})" for name, group in zip(seen.names, group_of, strict=True)]
        found = self._find(seen, rows, labels, near_peak)
        found["exploding"] = exploding
        alarms = self._collapse(seen, rows, labels)
        for kind, which in found.items():
            new = [name for name in which if (kind, name) not in self._told]
            self._told |= {(kind, name) for name in new}
            if new:
                text = f"{_TEXTS[kind].format(limit=f'{self.limits.exploding:g}')} {_listed(new)}"
                frozen = sum(name in new for place, name in seen.without if place in seen.frozen)
                if kind == "no_gradient" and frozen:
                    text += f"; {frozen} of these are frozen (requires_grad=False), which is right only if it is meant"
                alarms.append(alarm(kind, seen.step, text, tuple(new)))
        total = seen.sums()
        clipped = self.clip_rate.update(seen.step, seen.clipped, _share_left(total))
        alarms += [alarm("always_clipped", seen.step, clipped)] if clipped else []
        return [*alarms, *self._advise(seen, total)]

    def _collapse(self, seen: Inspection, rows: list[dict[str, float]], labels: list[str]) -> list[Alarm]:
        """Return an alarm if most of the network is dead, which had a gradient before; at each new time."""
        history, places = self.history, seen.places or range(len(rows))
        if history is None or self._has_converged():
            return []
        lasting, seen_last = history.without_gradient().tolist(), history.seen.tolist()
        died = [
            row["grad_sq"] == 0 and seen_last[place] > 0 and lasting[place]
            for place, row in zip(places, rows, strict=True)
        ]
        before, dead = self._most, sum(n for n, is_dead in zip(seen.numel, died, strict=True) if is_dead)
        self._most = not all(died) and 2 * dead > sum(seen.numel)
        if before or not self._most:
            return []
        which = [label for label, is_dead in zip(labels, died, strict=True) if is_dead]
        self._told |= {("dead", name) for name in which}
        return [alarm("dead", seen.step, f"{_TEXTS['dead']} {_listed(which)}", tuple(which), most=True)]

    def _find(
        self, seen: Inspection, rows: list[dict[str, float]], labels: list[str], near_peak: list[bool]
    ) -> dict[str, list[str]]:
        """Return what is wrong with single parameters and confirmed, by kind."""
        still = [near_peak[i] and self._is_still(row, seen, i) for i, row in enumerate(rows)]
        before = set(self._still)
        self._still = tuple(label for label, is_still in zip(labels, still, strict=True) if is_still)
        if self._has_converged():
            return {}
        places = seen.places or range(len(rows))
        at = dict(zip(places, rows, strict=True))
        missing = {place for place, _ in seen.without}
        zero = {place for place, row in at.items() if row["grad_sq"] == 0}
        numel = dict(zip(places, seen.numel, strict=True))
        rms = {place: _rms(row["grad_sq"], numel[place]) for place, row in at.items()}
        vanished = self._vanished(at, rms, numel) - zero
        largest = None if self.history is None else self.history.largest.tolist()
        by_eps = {
            place
            for place, row in at.items()
            if self._is_set_by_eps(row, numel[place], 0.0 if largest is None else largest[place])
        }
        bad = zero | vanished | by_eps | missing

        idle = self.parameters.idle(bad, rms, exact=False)
        if self.parameters.has_zero_inputs(zero, bad, rms):
            idle -= zero
        else:
            idle |= self.parameters.idle(zero | missing, rms, exact=True)
        spared = idle | {place for place in bad if self.parameters.is_spared(place, bad, rms)}
        lasting = None if self.history is None else self.history.without_gradient()
        dead = {place for place in zero if lasting is None or lasting[place]}
        unused = {p for p in missing if self.history is None or self.history.never_used(p)}
        label = dict(zip(places, labels, strict=True))
        found = {"no_gradient": [name for place, name in seen.without if place in unused - idle]}
        for kind, which in (("dead", dead), ("vanishing", vanished), ("stalled", by_eps)):
            found[kind] = [label[place] for place in places if place in which and place not in spared]
        found["rounded_away"] = []
        for i, place in enumerate(places):
            if still[i] and labels[i] in before and place not in idle:
                lossy = bool(seen.lossy and seen.lossy[i])
                if not self.parameters.is_spared(place, bad, rms, own_only=lossy):
                    found["rounded_away" if lossy else "stalled"].append(labels[i])
        return {kind: list(dict.fromkeys(which)) for kind, which in found.items()}

    def _vanished(
        self, at: Mapping[int, dict[str, float]], rms: Mapping[int, float], numel: Mapping[int, int]
    ) -> set[int]:
        """Return the places of the tensors whose gradient is next to nothing, now and in the steps before."""
        history, limit = self.history, self.limits.vanishing
        highest = max(rms.values(), default=0.0)
        small = {place for place, value in rms.items() if value < limit * highest}
        if history is None or not small:
            return small
        recent, first = history.recent.tolist(), history.first.tolist()
        lately = {place: _rms(recent[place], numel[place]) for place in at}
        largest = max(lately.values())
        # A branch that starts at zero passes on a gradient that grows.
        grows = {place for place in small if at[place]["grad_sq"] > _GROWN**2 * first[place]}
        return {place for place in small - grows if lately[place] < limit * largest}

    def _is_still(self, row: dict[str, float], seen: Inspection, i: int) -> bool:
        """Return whether a tensor with a gradient hardly changes in this step.

        A weight in 16 bits changes by at least half of the resolution of its dtype, or not at all. So a change of
        1/20 of the resolution, in quadratic mean, shows that at least 99 % of the updates are lost in rounding.
        """
        if i in seen.kept or not row["grad_sq"] > 0:
            return False
        limit_sq = self.limits.stalled**2
        if seen.lossy and seen.lossy[i]:
            limit_sq = (seen.lossy[i] / 20) ** 2 * (1 - row["zero_grad"] / seen.numel[i])
        return row["update_sq"] < limit_sq * row["param_sq"]

    def _is_set_by_eps(self, row: dict[str, float], numel: int, largest: float) -> bool:
        """Return whether ``eps`` alone sets the update, although the gradient has not become small by training.

        Args:
            row: Statistics of the tensor.
            numel: Its number of elements.
            largest: Largest square sum of its gradient so far; 0 if that is not known.
        """
        # Rows of an embedding that no batch has used yet have no second moment either.
        moving = numel - row["zero_grad"]
        by_eps = row["grad_sq"] > 0 and row["below_eps"] - row["zero_grad"] > self.limits.below_eps * moving
        return by_eps and not row["grad_sq"] < _FALLEN**2 * largest

    def _near_peak(self, group: str, lr: float) -> bool:
        peak = self._peaks[group] = max(lr, self._peaks.get(group, 0.0))
        return lr > 0 and lr >= NEAR_PEAK * peak

    def _explodes(self, group: str, norm: float) -> bool:
        history = self._norms[group]
        # After a loss of exactly 0, as of a margin, the median is 0 and any gradient above it.
        usual = statistics.median(history) if len(history) == _HISTORY else 0.0
        explodes = usual > 0 and norm > self.limits.exploding * usual
        history.append(norm)
        return explodes

    def _advise(self, seen: Inspection, total: Mapping[str, float]) -> list[Alarm]:
        if self._has_converged():
            return []
        peak = max(self._peaks.values(), default=0.0)
        rounds_away = any(kind == "rounded_away" for kind, _ in self._told)
        advice = self._advice.update(seen.step, total, seen.highest_lr(), peak, rounds_away)
        new = {kind: text for kind, text in advice.items() if (kind, "") not in self._told}
        self._told |= {(kind, "") for kind in new}
        return [alarm(kind, seen.step, text) for kind, text in new.items()]

    def _has_converged(self) -> bool:
        return self.history is not None and self.history.has_converged

    def rolled_back(self) -> None:
        """Forget what has been reported, because it concerned weights that no longer exist."""
        self._told.clear()
        self._still, self._most = (), False


_TEXTS = {
    "no_gradient": "no step so far has given a gradient to",
    "dead": "the gradient is exactly 0 in",
    "vanishing": "the gradient has all but vanished in",
    "stalled": "updates are too small to matter in",
    "rounded_away": "updates are below the resolution of bfloat16 or float16 weights, and round to nothing "
    "(`kahan_sum` or `stochastic_rounding` keeps them), in",
    "exploding": "the gradient norm is over {limit} times its median in",
}
"""What is reported of each kind, before the names."""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _share_left(total: Mapping[str, float]) -> float:
    """Return the share of the gradient norm that clipping has left; NaN if it is not known."""
    whole = total["grad_sq"]
    return math.sqrt(total["clipped_sq"] / whole) if whole > 0 else math.nan


def _rms(square_sum: float, numel: int) -> float:
    return math.sqrt(square_sum / max(numel, 1))
