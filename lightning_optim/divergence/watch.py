"""The guard of one step, before its update: inspection of gradients and loss, and the decision whether to skip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.stats import GradStats
from lightning_optim.core.transfer import upload
from lightning_optim.divergence.base import Detector, NonFiniteGradient
from lightning_optim.divergence.early_warning import EarlySign, EarlySigns, EarlyWarning, SecondMoments, group_maxima
from lightning_optim.divergence.gradient_history import GradientHistory
from lightning_optim.divergence.rates import RateHistory
from lightning_optim.divergence.spikes import SpikeWindow
from lightning_optim.divergence.step_log import StepLog

SIGNALS = ("grad_norm", "loss")
"""Names of the signals in which spikes are detected."""

_NAMED = 4
_IN_A_ROW = 3
"""Number of steps after a spike in which another one shows that skipping has not helped; two bad batches are rarely so
near, and a new level with much noise is flagged more often."""


@dataclass(frozen=True)
class StepObservation:
    """One step, as the guard observed it.

    Args:
        step: Number of optimizer steps so far, this one included.
        skipped: Whether the step did not happen, for any reason.
        bad_tensors: Number of gradients with a NaN or an infinity.
        bad_loss: Whether the loss was not finite.
        spikes: Those of `SIGNALS` that were spikes; such a step may have been taken.
        detected: Findings of further detectors, a clause for each that requested a skip.
        levels: Factor by which the baseline of a signal moved at this step, for each signal whose baseline moved.
        values: Gradient norm and loss; NaN for a loss that is unknown.
        medians: Medians of the values accepted before; infinite before the first.
        worst: Indices in the optimizer of the parameters with the worst gradients, those that are not finite first,
            then the largest; empty if nothing was wrong.
        group_norms: Gradient norm of each group.
        rate: Highest learning rate of the groups, as the step used it; NaN if it is not known.
        new_rate: Whether it, or one of the last ones, is far above all before them (`RateHistory.has_risen`).
        limits: Values above which a signal alone is a spike; infinite while too few are known.
        grad_over_second_moment: Root mean square of the gradient over that of its second moment, the largest of each
            group's tensors; empty if it was not asked for.
        update_to_come: The same of the last gradients, which stands for the update in units of the learning rate.
        early: Signs of groups whose update to come is too large.
    """

    step: int
    skipped: bool
    bad_tensors: int
    bad_loss: bool
    spikes: tuple[str, ...]
    detected: tuple[str, ...]
    levels: dict[str, float]
    values: dict[str, float]
    medians: dict[str, float]
    worst: tuple[int, ...]
    group_norms: tuple[float, ...]
    rate: float = math.nan
    new_rate: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    grad_over_second_moment: tuple[float, ...] = ()
    update_to_come: tuple[float, ...] = ()
    early: tuple[EarlySign, ...] = ()


class StepGuard(NonFiniteGradient):
    """Detector of one optimizer: inspects the loss and gradients of each step, requests a skip, and logs the step.

    A step is skipped if a gradient or the loss is not finite, or if a signal in ``skip`` is a spike. If a further spike
    follows within three steps, skipping has not helped, or the level of the loss has moved: it is skipped only if a
    value is beyond what the run has been through (`SpikeWindow.familiar`), or the learning rate is. On the device that
    is a comparison with a few limits. The statistics behind the limits are kept on the host, which reads each step from
    a `StepLog` and never waits for it. All ranks see the same gradients, and read them at the same step; the caller
    reduces the loss over ranks.

    Args:
        spikes: Limits beyond which a value is a spike; None for no detection of spikes.
        skip: Those of `SIGNALS` whose spikes cause a skip; may be changed between steps.
        loss: Called to get the loss of the step, on any device, or None if it is not known. Of a loss of several
            elements the mean counts.
        rows: The log to write to; None for a new one.
        detectors: Further detectors, which may request a skip as well.
        early_warning: When gradients are too large for their second moment, which is reported; None to leave it out.

    Attributes:
        steps: Number of steps so far, skipped ones included.
        history: What the steps that have arrived at the host show about the gradient of each parameter.

    Example:
        >>> watch = StepGuard()
        >>> watch(GradStats(torch.tensor([1.0, float("inf")]), group_sizes=(2,)))
        tensor(True)
        >>> watch.commit(torch.tensor(1.0))
        >>> seen = watch.read()[0]
        >>> seen.skipped, seen.bad_tensors, seen.worst
        (True, 1, (1, 0))
    """

    def __init__(
        self,
        spikes: SpikeWindow | None = None,
        skip: tuple[str, ...] = SIGNALS,
        loss: Callable[[], Tensor | None] = lambda: None,
        rows: StepLog | None = None,
        detectors: Sequence[Detector] = (),
        early_warning: EarlyWarning | None = None,
    ) -> None:
        self.spikes = spikes
        self.skip = skip
        self.moments = None if early_warning is None else SecondMoments()
        self.early = None if early_warning is None else EarlySigns(early_warning)
        self._group_names: tuple[str, ...] = ()
        self._loss = loss
        self._rate: Callable[[], float] = lambda: math.nan
        self.rows = StepLog() if rows is None else rows  # An empty log is falsy.
        self.detectors = tuple(detectors)
        self.history = GradientHistory()
        self.steps = 0
        self._now: tuple[list[Tensor], _Layout] | None = None
        self._layouts: dict[int, _Layout] = {}
        self._seen: list[StepObservation] = []
        self._limits: tuple[list[list[float]], Tensor] | None = None
        self._quiet: Tensor | int = _IN_A_ROW
        """Number of steps since the last spike, on the device once there has been a step."""
        self._next_quiet: Tensor | int = _IN_A_ROW
        self.rates = RateHistory()
        self._rates: dict[int, tuple[float, bool]] = {}

    def __call__(self, stats: GradStats) -> Tensor:
        """Return whether to skip the step, bool, shape [], on the device of ``stats``."""
        self.rates.update(self._rate())
        loss, norm = self._loss(), stats.total_norm()
        skip = ~stats.finite()
        if loss is None:
            values = torch.stack([norm, torch.full_like(norm, torch.nan)])
        else:
            values = torch.stack([norm, single_value(loss).to(norm, non_blocking=True)])
            skip = skip | (values[1] * 0 != 0)
        flags = torch.zeros_like(values, dtype=torch.bool)
        if self.spikes is not None:
            alone, together, familiar = self._limits_on(values, self.spikes).unbind()
            flags = (values > alone) | (values > together).all()
            if self.skip:
                quiet = self._quiet if isinstance(self._quiet, Tensor) else torch.full_like(norm, self._quiet)
                again = (quiet < _IN_A_ROW) & ~(values > familiar).any()
                found = self._of_interest(flags).any()
                skip = skip | (found if self.rates.has_risen else found & ~again)
                self._next_quiet = (quiet + 1) * ~(flags & (values < math.inf)).any()
        if self.detectors:
            asks = [d(stats).reshape(()).to(skip, non_blocking=True) for d in self.detectors]
            flags = torch.cat([flags, torch.stack(asks)])
            skip = skip | flags[len(SIGNALS) :].any()
        columns = [values, flags, stats.norm_sq, *([] if stats.places is None else [stats.places])]
        layout = _Layout(stats.group_sizes, loss is not None, stats.places is not None, len(self.detectors))
        if self.moments is not None:
            columns.append(self.moments(stats).flatten())
            layout, self._group_names = replace(layout, has_ratios=True), stats.group_names
        self._now = columns, layout
        return skip

    def commit(self, skip: Tensor) -> None:
        """End the step: send its row to the host, and process the rows that have arrived."""
        assert self._now is not None
        (columns, layout), self._now = self._now, None
        rate = self._rate()  # Without a closure the rate is cut after the decision, so it is read again.
        self.steps += 1
        self._quiet = self._next_quiet
        for detector in self.detectors:
            detector.commit(skip)
        if self.moments is not None:
            self.moments.commit(skip)
        dtype = columns[0].dtype
        row = torch.cat([column.to(dtype) for column in ((skip != 0).reshape(1), *columns)])
        self._layouts[self.steps] = layout
        self._rates[self.steps] = rate, self.rates.has_risen
        self.rows.write(self.steps, row)
        self._learn()

    def follow_rate(self, rate: Callable[[], float]) -> None:
        """Note the learning rate of each step as well.

        Args:
            rate: Called to get the highest one; it returns NaN if that is not known without waiting for the device.
        """
        self._rate = rate

    def read(self, everything: bool = False) -> list[StepObservation]:
        """Return the observations since the last call.

        Args:
            everything: Whether to wait for rows that have not arrived; see `StepLog.read`.
        """
        if everything:
            self._learn(everything)
        seen, self._seen = self._seen, []
        return seen

    def discard(self) -> None:
        """Discard the observations that have not been read."""
        self.rows.discard()
        self._layouts.clear()
        self._rates.clear()
        self._seen.clear()
        self._quiet = self._next_quiet = _IN_A_ROW

    def state_dict(self) -> dict[str, Any]:
        """Return baselines and the rows that have not arrived, as plain numbers and lists."""
        return {
            "steps": self.steps,
            "spikes": {} if self.spikes is None else self.spikes.state_dict(),
            "rows": self.rows.state_dict(),
            "quiet": int(self._quiet),
            "rates": self.rates.state_dict(),
            "rates_of_rows": {step: list(pair) for step, pair in self._rates.items()},
            "history": self.history.state_dict(),
            "detectors": {name: state for name, one in self._named_detectors() if (state := one.state_dict())},
            "early": {} if self.early is None else self.early.state_dict(),
            "moments": {} if self.moments is None else self.moments.state_dict(),
            "layouts": {
                step: [list(x.group_sizes), x.has_loss, x.has_places, x.num_detectors, list(x.moved), x.has_ratios]
                for step, x in self._layouts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.steps = state["steps"]
        self.rows.load_state_dict(state["rows"])
        self._layouts = {step: _Layout(tuple(sizes), *rest) for step, (sizes, *rest) in state["layouts"].items()}
        if self.spikes is not None and state["spikes"]:
            self.spikes.load_state_dict(state["spikes"])
        # Checkpoints of version 0.1 have none of these.
        self._quiet = self._next_quiet = state.get("quiet", _IN_A_ROW)
        if "rates" in state:
            self.rates.load_state_dict(state["rates"])
            self._rates = {step: (rate, is_new) for step, (rate, is_new) in state["rates_of_rows"].items()}
        for part, saved in ((self.early, state.get("early")), (self.moments, state.get("moments"))):
            if part is not None and saved:
                part.load_state_dict(saved)
        if "history" in state:
            self.history.load_state_dict(state["history"])
        known = state.get("detectors", {})
        for name, detector in self._named_detectors():
            if name in known:
                detector.load_state_dict(known[name])

    def move(self, places: Sequence[int]) -> None:
        """Follow parameters to other places in the optimizer, also in the rows that have not arrived yet.

        Args:
            places: The new place of the parameter at each old place; -1 for one that is gone.
        """
        self._layouts = {step: replace(layout, moved=tuple(places)) for step, layout in self._layouts.items()}
        if self.moments is not None:
            self.moments.move(places)
        self.history.move(places)

    def _named_detectors(self) -> Iterator[tuple[str, Detector]]:
        """Yield each further detector with a unique name, because two of one class must not share a checkpoint key."""
        taken: Counter[str] = Counter()
        for detector in self.detectors:
            taken[detector.name] += 1
            number = taken[detector.name]
            yield detector.name if number == 1 else f"{detector.name}_{number}", detector

    def _limits_on(self, values: Tensor, spikes: SpikeWindow) -> Tensor:
        """Return the limits, shape [3, signals], as ``values``; uploaded only if they have changed."""
        wanted = [spikes.alone, spikes.together, spikes.familiar]
        if self._limits is None or self._limits[0] != wanted or self._limits[1].device != values.device:
            self._limits = wanted, upload(wanted, values.device, values.dtype)
        return self._limits[1]

    def _of_interest(self, flags: Tensor) -> Tensor:
        """Return the flags of the signals whose spikes are skipped."""
        if len(self.skip) == len(SIGNALS):
            return flags
        return torch.stack([flag for flag, signal in zip(flags.unbind(), SIGNALS, strict=True) if signal in self.skip])

    def _learn(self, everything: bool = False) -> None:
        for row in self.rows.read(everything):
            layout = self._layouts.pop(row.step)
            self._seen.append(self._step_of(row.step, row.values, layout))

    def _step_of(self, step: int, row: np.ndarray, layout: _Layout) -> StepObservation:
        count = len(SIGNALS)
        skipped, values, rest = bool(row[0]), row[1 : 1 + count].tolist(), row[1 + count :]
        flags = [bool(flag) and math.isfinite(value) for flag, value in zip(rest[:count], values, strict=True)]
        others, rest = rest[count : count + layout.num_detectors], rest[count + layout.num_detectors :]
        # A row that was in transfer when a run was saved may come from other detectors than the present ones.
        present = self.detectors if layout.num_detectors == len(self.detectors) else ()
        detected = tuple(_found(d) for d, flag in zip(present, others, strict=False) if flag)
        norm_sq = rest[: sum(layout.group_sizes)]
        places = rest[len(norm_sq) : 2 * len(norm_sq)] if layout.has_places else None
        bad = ~np.isfinite(norm_sq)
        at = places
        if layout.moved:
            at = np.array(layout.moved)[np.arange(len(norm_sq)) if places is None else places.astype(int)]
        if at is None or (at >= 0).all():  # Some may be gone by now.
            self.history.update(step, norm_sq, at, values[1])
        bad_loss = layout.has_loss and not math.isfinite(values[1])
        medians, levels, limits = [math.nan] * count, [0.0] * count, [math.inf] * count
        if self.spikes is not None:
            medians, limits = self.spikes.medians, self.spikes.alone
            levels = self.spikes.update(values, flags, not skipped, behind=len(self.rows))
        rate, is_new = self._rates.pop(step, (math.nan, False))
        over, update, signs = self._early_of(rest, norm_sq, layout, not skipped)
        early = tuple(replace(x, worst=layout.now(_places(x.worst, places))) for x in signs)
        wrong = skipped or bad_loss or any(flags) or bool(detected) or bool(bad.any())
        return StepObservation(
            step=step,
            skipped=skipped,
            bad_tensors=int(bad.sum()),
            bad_loss=bad_loss,
            spikes=tuple(signal for signal, flag in zip(SIGNALS, flags, strict=True) if flag),
            detected=detected,
            levels={signal: level for signal, level in zip(SIGNALS, levels, strict=True) if level},
            values=dict(zip(SIGNALS, values, strict=True)),
            medians=dict(zip(SIGNALS, medians, strict=True)),
            worst=layout.now(_worst(norm_sq, bad, places)) if wrong else (),
            group_norms=_group_norms(norm_sq, layout.group_sizes),
            rate=rate,
            new_rate=is_new,
            limits=dict(zip(SIGNALS, limits, strict=True)),
            grad_over_second_moment=over,
            update_to_come=update,
            early=early,
        )

    def _early_of(
        self, rest: np.ndarray, norm_sq: np.ndarray, layout: _Layout, accepted: bool
    ) -> tuple[tuple[float, ...], tuple[float, ...], tuple[EarlySign, ...]]:
        """Return the two ratios of each group, and the signs; empty where the row has no ratios."""
        if not layout.has_ratios or self.early is None:
            return (), (), ()
        squares = rest[-2 * len(norm_sq) :].reshape(2, -1)
        over, update = np.sqrt(np.where(np.isfinite(squares), squares, 0.0))
        largest, signs = self.early.update(update, layout.group_sizes, self._group_names, accepted)
        return group_maxima(over, layout.group_sizes), largest, signs


def single_value(loss: Tensor) -> Tensor:
    """Return a loss as one real number.

    Args:
        loss: Any shape and dtype: [], [1] and [1, 1] alike, or a value for each sample, of which the mean counts. Of
            complex values the absolute values count.

    Returns:
        Shape [], at least float32; 0 if there is no element.
    """
    loss = loss.detach()
    loss = loss.abs() if loss.is_complex() else loss
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # The mean of large values may overflow 16 bits.
    if loss.numel() == 1:
        return loss.reshape(())
    return loss.mean() if loss.numel() else loss.sum()


@dataclass(frozen=True)
class _Layout:
    """Layout of a row, which the host needs to read it."""

    group_sizes: tuple[int, ...]
    has_loss: bool
    has_places: bool
    num_detectors: int = 0
    moved: tuple[int, ...] = ()
    """Where the parameter at each place is now, if the run was resumed with another order; -1 for one that is gone."""
    has_ratios: bool = False

    def now(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Return where the parameters at these places are now."""
        return tuple(self.moved[p] for p in places if self.moved[p] >= 0) if self.moved else places


def _found(detector: Detector) -> str:
    return f"{detector.name}: {detector.reason}" if detector.reason else f"{detector.name} requested it"


def _worst(norm_sq: np.ndarray, bad: np.ndarray, places: np.ndarray | None) -> tuple[int, ...]:
    order = np.argsort(-np.where(bad, np.inf, norm_sq), kind="stable")[:_NAMED]
    return _places(order.tolist(), places)


def _places(rows: Sequence[int], places: np.ndarray | None) -> tuple[int, ...]:
    """Return the index in the optimizer of each row."""
    return tuple(rows) if places is None else tuple(int(places[row]) for row in rows)


def _group_norms(norm_sq: np.ndarray, sizes: Sequence[int]) -> tuple[float, ...]:
    ends = np.cumsum(sizes)
    return tuple(float(np.sqrt(norm_sq[end - size : end].sum())) for end, size in zip(ends, sizes, strict=True))
