"""By which metric runs are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_optim.core.suggest import nearest
from lightning_optim.diagnostics.metric_names import is_better_higher, quantity_of, split_of
from lightning_optim.tuning.runs import JobResult

TRAIN_LOSS = "train_loss"
"""Name of the mean training loss of the end, where there is no metric of validation."""


@dataclass(frozen=True)
class Metric:
    """A metric and which way it is better.

    Args:
        name: Its name.
        higher: Whether larger values are better.
        note: What has to be said about the choice; empty for nothing.
        of_validation: Whether it is one of validation, rather than the training loss that each run records.
    """

    name: str
    higher: bool = False
    note: str = ""
    of_validation: bool = True

    def best(self, result: JobResult) -> tuple[int, float, float] | None:
        """Return the best point of a run: step, value, seconds; None without a finite one."""
        if self.of_validation:
            return result.best(self.name, self.higher)
        loss = result.train_loss
        return None if loss is None or not math.isfinite(loss) else (result.steps, loss, result.seconds)

    def last(self, result: JobResult) -> float | None:
        """Return the last value of a run; None without one."""
        return result.metrics.get(self.name) if self.of_validation else result.train_loss

    def gap(self, result: JobResult) -> float | None:
        """Return how much worse the loss of validation is than that of training, where the former is best."""
        name = self.name if self._is_loss(self.name) else next(filter(self._is_loss, result.metrics), None)
        if name is None or (best := result.best(name)) is None or not self.of_validation:
            return None
        training = result.train_loss_at(best[0])
        return None if training is None else best[1] - training

    @staticmethod
    def _is_loss(name: str) -> bool:
        return split_of(name) == "validation" and quantity_of(name) == "loss"


def choose_metric(results: Sequence[JobResult], name: str | None = None, mode: str | None = None) -> Metric:
    """Choose the metric: the given one, else a loss of validation, else another metric of it, else the training loss.

    Args:
        results: Results of runs that have trained.
        name: Name of a metric of validation, or ``"train_loss"``.
        mode: ``"min"`` or ``"max"``; None for what the name tells.

    Returns:
        The metric, with a note if its choice has to be explained.

    Raises:
        ValueError: No run has the metric, or ``mode`` is unknown.
    """
    if mode not in (None, "min", "max"):
        raise ValueError(f"Invalid mode={mode!r}: must be 'min' or 'max'.")
    unknown: list[str] = []
    names = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    if name is not None and name not in names and name != TRAIN_LOSS:
        raise ValueError(f"Invalid metric={name!r}: no run has logged it. {nearest(name, [*names, TRAIN_LOSS])}")
    if name is None:
        seen = {each for result in results for each in result.facts.get("validated", ())}
        validated = [each for each in names if split_of(each) == "validation" or each in seen]
        unknown = [each for each in validated if is_better_higher(each) is None]
        validated = [each for each in validated if each not in unknown]
        losses = [each for each in validated if quantity_of(each) == "loss"]
        lower = [each for each in validated if not is_better_higher(each)]
        found = next(iter([*sorted(losses, key=len), *lower, *validated]), None)
    else:
        found = name
    if found is None or (found == TRAIN_LOSS and TRAIN_LOSS not in names):
        others = f"; {', '.join(unknown)} may be better or worse when larger" if unknown else ""
        note = f"No loss of validation was found{others}: the training loss is compared (--metric NAME, --mode)."
        note = "" if name else note
        return Metric(TRAIN_LOSS, mode == "max", note, of_validation=False)
    known = is_better_higher(found)
    if mode is not None:
        return Metric(found, mode == "max")
    note = f"Whether a larger {found} is better is not known from its name; smaller is assumed (--mode max)."
    return Metric(found, bool(known), note if known is None else "")
