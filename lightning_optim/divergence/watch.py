"""The guard of one step, before its update: inspection of gradients and loss, and the decision whether to skip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.fragment import NUMBER, Fragment
from lightning_optim.core.stats import GradStats
from lightning_optim.core.transfer import upload
from lightning_optim.divergence.base import Detector, NonFiniteGradient
from lightning_optim.divergence.early_warning import (
    EarlySign,
    EarlySigns,
    EarlyWarning,
    SecondMoments,
    group_maxima,
    weights_of,
)
from lightning_optim.divergence.gradient_history import GradientHistory
from lightning_optim.divergence.observation import SIGNALS, StepObservation, single_value
from lightning_optim.divergence.rates import RateHistory
from lightning_optim.divergence.spikes import SpikeWindow
from lightning_optim.divergence.step_log import StepLog
from lightning_optim.divergence.step_row import RowLayout, StepRow

_IN_A_ROW = 3
"""Number of steps after a spike in which another one shows that skipping has not helped; two bad batches are rarely so
near, and a new level with much noise is flagged more often."""
_LIMITS = ("alone", "together", "familiar", "harmful")
"""The limits of `SpikeWindow` that a step is compared with."""
_VALUES = ("norm", "loss")
"""Names of the signals in a program."""


class StepGuard(NonFiniteGradient):
    """Detector of one optimizer: inspects the loss and gradients of each step, requests a skip, and logs the step.

    A step is skipped if a gradient or the loss is not finite, or if a signal in ``skip`` is a spike that is high enough
    to do harm (`SpikeWindow.harmful`). If a further spike follows within three steps, skipping has not helped, or the
    level of the loss has moved: it is skipped only if a value is beyond what the run has been through
    (`SpikeWindow.familiar`), or the learning rate is.

    On the device that is a comparison with a few limits. The statistics behind the limits are kept on the host, which
    reads each step from a `StepLog` and never waits for it. All ranks see the same gradients, and read them at the same
    step; the caller reduces the loss over ranks.

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
        self._now: tuple[list[Tensor], RowLayout] | None = None
        self._layouts: dict[int, RowLayout] = {}
        self._seen: list[StepObservation] = []
        self._limits: tuple[list[list[float]], Tensor] | None = None
        self._quiet: Tensor | int = _IN_A_ROW
        """Number of steps since the last spike, on the device once there has been a step."""
        self._next_quiet: Tensor | int = _IN_A_ROW
        self.rates = RateHistory()
        self._rates: dict[int, tuple[float, bool]] = {}

    def __call__(self, stats: GradStats) -> Tensor:
        """Return whether to skip the step, bool, shape [], on the device of ``stats``."""
        loss, norm = self.begin(), stats.total_norm()
        skip = ~stats.finite()
        if loss is None:
            values = torch.stack([norm, torch.full_like(norm, torch.nan)])
        else:
            values = torch.stack([norm, loss.to(norm, non_blocking=True)])
            skip = skip | (values[1] * 0 != 0)
        if self.spikes is None:
            flags = torch.zeros_like(values, dtype=torch.bool)
        else:
            alone, together, familiar, harmful = self._limits_on(values, self.spikes).unbind()
            flags = (values > alone) | (values > together).all()
            if self.skip:
                quiet = self._quiet if isinstance(self._quiet, Tensor) else torch.full_like(norm, self._quiet)
                least = harmful if self.rates.has_risen else torch.where(quiet < _IN_A_ROW, familiar, harmful)
                skip = skip | self._of_interest(flags & (values > least)).any()
                self._next_quiet = (quiet + 1).masked_fill(flags.any(), 0)
        if self.detectors:
            asks = [d(stats).reshape(()).to(skip, non_blocking=True) for d in self.detectors]
            flags = torch.cat([flags, torch.stack(asks)])
            skip = skip | flags[len(SIGNALS) :].any()
        columns = [values, flags, stats.norm_sq, *([] if stats.places is None else [stats.places])]
        layout = RowLayout(stats.group_sizes, loss is not None, stats.places is not None, len(self.detectors))
        if self.moments is not None:
            columns.append(self.moments(stats).flatten())
            layout, self._group_names = replace(layout, has_ratios=True), stats.group_names
        self._now = columns, layout
        return skip

    def commit(self, skip: Tensor) -> None:
        """End the step: send its row to the host, and process the rows that have arrived."""
        assert self._now is not None
        (columns, layout), self._now = self._now, None
        for detector in self.detectors:
            detector.commit(skip)
        if self.moments is not None:
            self.moments.commit(skip)
        dtype = columns[0].dtype
        row = torch.cat([column.to(dtype) for column in ((skip != 0).reshape(1), *columns)])
        self._end(row, layout, self._next_quiet)

    def _end(self, row: Tensor, layout: RowLayout, quiet: Tensor | int) -> None:
        rate = self._rate()  # Without a closure the rate is cut after the decision, so it is read again.
        self.steps += 1
        self._quiet = self._next_quiet = quiet
        self._layouts[self.steps] = layout
        self._rates[self.steps] = rate, self.rates.has_risen
        self.rows.write(self.steps, row)
        self._learn()

    # The same decision as a part of the program that decides a step in one launch (`lightning_optim.step.fused`).

    def begin(self) -> Tensor | None:
        """Begin a step: note its rate, and return its loss as one real number, shape [], on any device, if known."""
        self.rates.update(self._rate())
        loss = self._loss()
        return None if loss is None else single_value(loss)

    def fragment(self, has_loss: bool) -> Fragment:
        """Return the decision as lines of a program, but for that of further detectors.

        Args:
            has_loss: Whether the loss is known.
        """
        lines, numbers = ["skip = negation(finite)"], tuple[str, ...]()
        if has_loss:
            lines.append("skip = skip | negation(loss * 0.0 == 0.0)")
        new_quiet = "quiet"
        if self.spikes is None:
            lines += ["norm_flag = norm < 0.0", "loss_flag = norm < 0.0"]
        else:
            numbers = ("risen", *(f"{name}_{which}" for which in _LIMITS for name in _VALUES))
            lines.append("both = (norm > norm_together) & (loss > loss_together)")
            lines += [f"{name}_flag = ({name} > {name}_alone) | both" for name in _VALUES]
            if self.skip:
                lines.append(f"seldom = (risen == 0.0) & (quiet < {float(_IN_A_ROW)})")
                lines += [
                    f"skip = skip | ({name}_flag & ({name} > pick(seldom, {name}_familiar, {name}_harmful)))"
                    for name, signal in zip(_VALUES, SIGNALS, strict=True)
                    if signal in self.skip
                ]
                new_quiet = "pick(norm_flag | loss_flag, 0.0, quiet + 1.0)"
        lines.append(f"new_quiet = {new_quiet}")
        moments = Fragment() if self.moments is None else self.moments.fragment()
        states = (("quiet", NUMBER), *moments.states)
        return Fragment((*lines, *moments.lines), numbers, moments.vectors, states, always=("quiet",))

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers of the fragment: the limits of this step."""
        if (spikes := self.spikes) is None:
            return ()
        risen = float(self.rates.has_risen)
        return (risen, *spikes.alone, *spikes.together, *spikes.familiar, *spikes.harmful)

    def vectors(self, decays: Sequence[tuple[float, float]], group_sizes: Sequence[int]) -> Sequence[Sequence[float]]:
        """Return the vectors of the fragment, one value for each parameter.

        Args:
            decays: Decays of the averages of gradients and of their squares in each group.
            group_sizes: Number of parameters in each group.
        """
        return [] if self.moments is None else weights_of(decays, group_sizes).tolist()

    def states(self, parameters: int, device: torch.device) -> dict[str, Tensor]:
        """Return the states of the fragment, float64, on ``device``.

        Args:
            parameters: Number of parameters of the optimizer.
            device: Where to have them.
        """
        if not isinstance(self._quiet, Tensor) or self._quiet.device != device:
            self._quiet = upload(float(self._quiet), device, torch.float64)
        states = {"quiet": self._quiet}
        return states if self.moments is None else states | {"averages": self.moments.averages(parameters, device)}

    def adopt(self, states: Mapping[str, Tensor], row: Tensor, layout: RowLayout, group_names: tuple[str, ...]) -> None:
        """End a step that the program has decided.

        Args:
            states: The states after the step.
            row: The row of the step, with its last word on whether it was skipped.
            layout: Layout of the row, but for the ratios.
            group_names: Name of each parameter group.
        """
        self._now = None
        if self.moments is not None:
            self.moments.adopt(states["averages"])
            layout, self._group_names = replace(layout, has_ratios=True), group_names
        self._end(row, layout, states["quiet"])

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
            "layouts": {step: layout.as_list() for step, layout in self._layouts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.steps = state["steps"]
        self.rows.load_state_dict(state["rows"])
        self._layouts = {step: RowLayout.from_list(saved) for step, saved in state["layouts"].items()}
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
        """Return the limits, shape [4, signals], as ``values``; uploaded only if they have changed."""
        wanted = [spikes.alone, spikes.together, spikes.familiar, spikes.harmful]
        if self._limits is None or self._limits[0] != wanted or self._limits[1].device != values.device:
            self._limits = wanted, upload(wanted, values.device, values.dtype)
        return self._limits[1]

    def _of_interest(self, flags: Tensor) -> Tensor:
        """Return the flags of the signals whose spikes are skipped."""
        if len(self.skip) == len(SIGNALS):
            return flags
        return torch.stack([flag for flag, signal in zip(flags.unbind(), SIGNALS, strict=True) if signal in self.skip])

    def _learn(self, everything: bool = False) -> None:
        for logged in self.rows.read(everything):
            row = self._layouts.pop(logged.step).read(logged.values)
            self._seen.append(self._observation(logged.step, row))

    def _observation(self, step: int, row: StepRow) -> StepObservation:
        """Update the statistics by a step, and return what was observed of it."""
        places = row.places_now()
        if places is None or (places >= 0).all():  # Some may be gone by now.
            self.history.update(step, row.norm_sq, places, row.values[1])
        count = len(SIGNALS)
        medians, levels, limits = [math.nan] * count, [0.0] * count, [math.inf] * count
        if self.spikes is not None:
            medians, limits = self.spikes.medians, self.spikes.alone
            levels = self.spikes.update(row.values, row.flags, not row.skipped, behind=len(self.rows))
        rate, is_new = self._rates.pop(step, (math.nan, False))
        over, update, early = self._early_of(row)
        detected, bad_tensors, bad_loss = self._found_by_detectors(row), row.bad_tensors, row.bad_loss
        wrong = row.skipped or bad_loss or any(row.flags) or bool(detected) or bad_tensors > 0
        return StepObservation(
            step=step,
            skipped=row.skipped,
            bad_tensors=bad_tensors,
            bad_loss=bad_loss,
            spikes=tuple(signal for signal, flag in zip(SIGNALS, row.flags, strict=True) if flag),
            detected=detected,
            levels={signal: level for signal, level in zip(SIGNALS, levels, strict=True) if level},
            values=dict(zip(SIGNALS, row.values, strict=True)),
            medians=dict(zip(SIGNALS, medians, strict=True)),
            worst=row.worst() if wrong else (),
            group_norms=row.group_norms(),
            rate=rate,
            new_rate=is_new,
            limits=dict(zip(SIGNALS, limits, strict=True)),
            grad_over_second_moment=over,
            update_to_come=update,
            early=early,
        )

    def _found_by_detectors(self, row: StepRow) -> tuple[str, ...]:
        # A row that was in transfer when a run was saved may come from other detectors than the present ones.
        present = self.detectors if len(row.detected) == len(self.detectors) else ()
        found = [detector for detector, flag in zip(present, row.detected, strict=False) if flag]
        return tuple(f"{d.name}: {d.reason}" if d.reason else f"{d.name} requested it" for d in found)

    def _early_of(self, row: StepRow) -> tuple[tuple[float, ...], tuple[float, ...], tuple[EarlySign, ...]]:
        """Return the two ratios of each group, and the signs; empty where the row has no ratios."""
        if row.ratios_sq is None or self.early is None:
            return (), (), ()
        over, update = np.sqrt(np.where(np.isfinite(row.ratios_sq), row.ratios_sq, 0.0))
        sizes = row.layout.group_sizes
        largest, signs = self.early.update(update, sizes, self._group_names, not row.skipped)
        return group_maxima(over, sizes), largest, tuple(replace(x, worst=row.parameters(x.worst)) for x in signs)
