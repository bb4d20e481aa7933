"""Judgement of each step: the alarms that its observation raises, and whether they mean more than one bad batch."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping

from lightning_optim.core.stateful import Stateful
from lightning_optim.divergence.alarms import Alarm, alarm
from lightning_optim.divergence.observation import StepObservation
from lightning_optim.divergence.spikes import GAP
from lightning_optim.divergence.trend import SUSTAINED, SlowDivergence

_DATA = 40
"""Number of steps in which a jump is attributed to the data, once the data has turned out to be the cause.

It leaves room for the 16 flags after which a new level is adopted."""
_BLAMED = 150
"""Number of steps after a rise of the learning rate to new heights in which a higher loss is put down to it."""
_UNSTABLE = 1000
_AT_ONCE, _LATELY = 2.0, 8
"""Factor by which a rate has risen at once, and the number of steps in which it has."""
_RESTART = 2.0
"""Factor on the learning rate since the best loss that is a restart, after which that best means nothing."""


class DivergenceJudge(Stateful):
    """Judgement of the steps of one optimizer, in order.

    A lasting jump of the loss or gradient norm, and a loss that leaves its best, may have two causes: the weights have
    become worse, or the data, the loss function or what is trained has changed. An update of the usual size does not
    make the weights twice as bad. So with ``judge_loss=None`` a jump is put down to the weights only if the learning
    rate has risen above all former ones within the last steps, and a slow rise only in that case or if it is clear
    (`SlowDivergence.rise_was_clear`); neither before the loss has ever fallen. Everything else is reported. For 1000
    steps after a response to worse weights a run is unstable, and every further rise asks for one.

    The first loss after a rollback shows whether the weights were the cause: if it is as high with those of the
    snapshot, the data or the loss function has changed, and another rollback would not help. The level is then
    accepted.

    Args:
        trend: Detector of slow divergence; None for none.
        patience: Number of consecutive bad steps that means more than a bad batch.
        judge_loss: Whether the loss is expected to fall, so that a rise asks for a response: always (True), never
            (False), or on the conditions above (None).
        scaled: Whether a GradScaler scales the gradients. One that is not finite, at a finite loss, is then an
            overflow, by which the scaler finds its scale, and raises no alarm. The same holds at an infinite loss,
            which may be finite before scaling; if it is not, ``overflows`` of them in a row collapse the scale.
        overflows: Number of consecutive overflows that is a collapse of the loss scale. From its start at 2¹⁶ the scale
            falls below any useful value (2⁻⁴) within 20.
    """

    STATE = ("counts", "rate_at_best", "last_rates")
    PARTS = ("trend",)
    ADDED = ("rate_at_best", "last_rates")

    def __init__(
        self,
        trend: SlowDivergence | None = None,
        patience: int = 5,
        scaled: bool = False,
        overflows: int = 20,
        judge_loss: bool | None = True,
    ) -> None:
        self.trend = trend
        self.patience, self.scaled, self.overflows = patience, scaled, overflows
        self.judge_loss = judge_loss
        self._counts: defaultdict[str, int] = defaultdict(int, quiet=GAP)
        self._rate_at_best = (math.inf, math.inf)
        self._last_rates: deque[float] = deque(maxlen=_LATELY)

    @property
    def overflow_steps(self) -> int:
        """Number of overflows of the GradScaler so far."""
        return self._counts["overflows"]

    def update(self, seen: StepObservation, names: Mapping[int, str]) -> list[Alarm]:
        """Judge a step.

        Args:
            seen: The observation of the step.
            names: Name of each parameter of the optimizer, by its index.

        Returns:
            The alarms; an empty list for a healthy step.
        """
        counts = self._counts
        self._follow_rate(seen.rate, seen.new_rate)
        worst = tuple(names.get(place, f"parameter {place}") for place in seen.worst)
        if seen.bad_tensors and self.scaled and (not seen.bad_loss or seen.values["loss"] == math.inf):
            return self._overflow(seen, worst)
        counts["overflows_in_a_row"] = 0
        if seen.bad_tensors or seen.bad_loss:
            return self._nonfinite(seen, worst)
        for passing in ("data", "unstable"):
            counts[passing] = max(0, counts[passing] - 1)
        found = self._detected(seen, worst)
        if not (seen.spikes or found):
            counts["bad_in_a_row"] = 0
        found += self._early(seen, names) + self._finite(seen, worst)
        counts["quiet"] = 0 if seen.spikes else counts["quiet"] + 1
        return found

    def _follow_rate(self, rate: float, is_new: bool) -> None:
        """Note a rise to new heights, and drop the best loss after a restart, which raises the loss again."""
        counts = self._counts
        rose_at_once = is_new and rate > _AT_ONCE * min(self._last_rates, default=math.inf)
        counts["blamed"] = _BLAMED if is_new else max(0, counts["blamed"] - 1)
        counts["blamed_at_once"] = _BLAMED if rose_at_once else max(0, counts["blamed_at_once"] - 1)
        last_rate = self._last_rates[-1] if self._last_rates else math.inf
        self._last_rates.append(rate)
        if self.trend is None or not math.isfinite(rate):
            return
        best, rate_then = self._rate_at_best
        if self.trend.best != best:  # by the last step
            rate_then = last_rate
        if rate > _RESTART * rate_then and not counts["blamed"]:
            self.trend.rebase()
            rate_then = rate
        self._rate_at_best = self.trend.best, rate_then

    def _acts_on_loss(self, is_clear: bool) -> bool:
        """Return whether a rise of the loss asks for a response."""
        if self.judge_loss is not None:
            return self.judge_loss
        counts = self._counts
        if counts["unstable"] or (counts["fallen"] and is_clear):
            return True
        if not (counts["fallen"] and counts["blamed"]):
            return False
        # A rate that rises slowly, as in a warm-up, takes several steps to raise the loss; a term joins between two.
        return bool(counts["blamed_at_once"]) or self.trend is None or not self.trend.rose_at_once

    def _overflow(self, seen: StepObservation, worst: tuple[str, ...]) -> list[Alarm]:
        counts = self._counts
        counts["overflows"] += 1
        counts["overflows_in_a_row"] += 1
        if counts["overflows_in_a_row"] % self.overflows:
            return []
        row = counts["overflows_in_a_row"]
        text = f"{row} overflows in a row, in {_listed(worst[: seen.bad_tensors])}: the loss scale has collapsed"
        return [alarm("loss_scale_collapse", seen.step, text, worst[: seen.bad_tensors])]

    def _nonfinite(self, seen: StepObservation, worst: tuple[str, ...]) -> list[Alarm]:
        counts = self._counts
        counts["bad_in_a_row"] += 1
        bad = worst[: seen.bad_tensors]
        what = "its loss is not finite" if seen.bad_loss else "its gradients are not finite"
        where = f", {seen.bad_tensors} of them, first of all {_listed(bad)}" if bad and not seen.bad_loss else ""
        row = counts["bad_in_a_row"]
        lasts = row % self.patience == 0
        text = f"{what}{where}" + (f", for {row} steps in a row" if lasts and row > 1 else "")
        return [alarm("nonfinite", seen.step, text, bad, escalates=lasts)]

    def _detected(self, seen: StepObservation, worst: tuple[str, ...]) -> list[Alarm]:
        """Return the alarms of the user's detectors; ``patience`` of them in a row escalate, as other bad steps do."""
        found = seen.detected
        if seen.skipped and not (found or seen.spikes):  # The pipeline has a detector that is not the guard's.
            found = ("another detector of the step requested it",)
        if not found:
            return []
        self._counts["bad_in_a_row"] += 1
        row = self._counts["bad_in_a_row"]
        lasts = row % self.patience == 0
        lasting = f", for {row} steps in a row" if lasts and row > 1 else ""
        return [alarm("detected", seen.step, text + lasting, worst, escalates=lasts) for text in found]

    def _early(self, seen: StepObservation, names: Mapping[int, str]) -> list[Alarm]:
        """Return the warning of an update that will be too large; none where the step is reported anyway."""
        signs = [sign for sign in seen.early if sign.is_news]
        if seen.skipped or seen.spikes or not signs:
            return []
        most = max(signs, key=lambda sign: sign.value)
        worst = tuple(names.get(place, f"parameter {place}") for place in most.worst)
        text = (
            f"gradients of group {most.group} are {most.value:.3g} times as large as their second moment says, usually "
            f"{most.usual:.3g}, so its updates grow before the loss shows it; most of all in {_listed(worst)}"
        )
        return [alarm("early_warning", seen.step, text, worst)]

    def _finite(self, seen: StepObservation, worst: tuple[str, ...]) -> list[Alarm]:
        alarms = []
        if self._counts["returned"] and self.trend is not None:
            self._counts["returned"] = 0
            if self.trend.far(seen.values["loss"]):
                self._counts["data"] = _DATA
                self.trend.rebase()
                text = "the loss is as high with the weights of the snapshot, so the data is the cause: a new level"
                alarms.append(alarm("new_level", seen.step, text))
        is_first = self._counts["quiet"] >= GAP
        if seen.spikes and (seen.skipped or is_first):  # Those that follow and are taken tell nothing new.
            high = " and ".join(f"{_LABELS[s]} {seen.values[s]:.3g} against {seen.medians[s]:.3g}" for s in seen.spikes)
            text = f"{high}; the largest gradients are in {_listed(worst)}"
            alarms.append(alarm("spike", seen.step, text, worst))
        if self.trend is not None and not seen.skipped:
            alarms += self._trend_alarms(seen, self.trend)
        for signal, factor in seen.levels.items():
            jumped = factor >= SUSTAINED and not self._counts["data"] and self._acts_on_loss(is_clear=False)
            text = f"{_LABELS[signal]} stays {factor:.3g} times as high" + (
                "" if jumped else ", which is taken as its new level"
            )
            alarms.append(alarm("jump" if jumped else "new_level", seen.step, text))
            if self.trend is not None and not jumped:
                self.trend.rebase()
        return alarms

    def _trend_alarms(self, seen: StepObservation, trend: SlowDivergence) -> list[Alarm]:
        rises = trend.update(seen.values["loss"], seen.values["grad_norm"])
        self._counts["fallen"] |= trend.has_fallen
        if not rises:
            return []
        lost = trend.lost
        text = "the loss stays at more than twice its best" if lost else "the loss is leaving its best"
        acts = self._acts_on_loss(trend.rise_was_clear)
        if trend.rise_was_sudden and not acts:
            if trend.rose_at_once:
                self._counts["data"] = _DATA
            trend.rebase()
        kind = "reported_lost" if lost else "reported_rise"
        again = bool(self._counts[kind]) and not acts
        self._counts[kind] = 1
        if not acts:
            text += ", and nothing shows that the weights are the cause; no response (`judge_loss: true` asks for one)"
        return [alarm("slow_divergence", seen.step, text, escalates=acts, lost=lost, is_repeated=again)]

    def assess(self, found: Alarm) -> Alarm:
        """Turn an alarm about parameters into a collapse, if most of the network is dead and it has learned nothing.

        The loss has to confirm it, because experts without a token and skipped layers have no gradient either.

        Args:
            found: An alarm of `ParameterHealth`.

        Returns:
            The collapse, or ``found`` itself.
        """
        is_judged = self.judge_loss is not False and self.trend is not None and not self.trend.learned
        if found.kind == "dead" and found.most and is_judged:
            text = f"most of the network is dead, and the loss no better than at the start: {found.text}"
            return alarm("collapsed", found.step, text, found.names)
        return found

    def responded(self, stands: bool = True) -> None:
        """Note a response to worse weights: the run is unstable, so that every further rise asks for one.

        Args:
            stands: Whether the response stands; False if it was undone.
        """
        self._counts["unstable"] = _UNSTABLE * stands

    def rolled_back(self) -> None:
        """Reset the counts of consecutive steps after a rollback."""
        self._counts.update(bad_in_a_row=0, overflows_in_a_row=0, returned=1, data=0, quiet=GAP)


_LABELS = {"grad_norm": "gradient norm", "loss": "loss"}


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no tensor"
