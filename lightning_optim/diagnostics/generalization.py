"""The gap between validation and training, and advice where one rises while the other falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_optim.diagnostics.metric_names import is_better_higher, quantity_of


@dataclass(frozen=True)
class Look:
    """A metric at one validation.

    Args:
        step: The step.
        validation: Its value in validation.
        training: Its value in training, over about the time since the last validation.
    """

    step: int
    validation: float
    training: float


class Generalization:
    """Validation metrics beside those of training.

    Advice is given once validation has been worse than its best in ``patience`` looks in a row, and has kept getting
    worse, while training got better. It is given again only after validation has reached a new best.

    Args:
        patience: Number of looks in a row, at least 1.
        tolerance: Least relative change that counts as one.

    Example:
        >>> watch = Generalization(patience=2)
        >>> for step, (val, train) in enumerate([(1.0, 1.0), (0.8, 0.7), (0.9, 0.5), (1.0, 0.3)]):
        ...     advice = watch.update("val_loss", "train_loss", Look(step, val, train))
        >>> advice[:73]
        'val_loss has risen from 0.8 (step 1) to 1 (step 3) while train_loss fell '
    """

    def __init__(self, patience: int = 3, tolerance: float = 0.01) -> None:
        self._patience, self._tolerance = patience, tolerance
        self._best: dict[str, Look] = {}
        self._since: dict[str, list[Look]] = {}
        self._advised: set[str] = set()

    @staticmethod
    def gap(name: str, look: Look) -> float:
        """Return how much worse a metric is in validation than in training; below 0 where it is better.

        Args:
            name: Name of the metric, which tells which way is better; less is, if it does not.
            look: Its values.
        """
        difference = look.validation - look.training
        return -difference if is_better_higher(name) else difference

    def update(self, name: str, training_name: str, look: Look, decay: float | None = None) -> str | None:
        """Add a look at a metric.

        Args:
            name: Name of the validation metric.
            training_name: Name of that of training.
            look: The values.
            decay: Weight decay of the optimizer, for the advice; None if it has none.

        Returns:
            The advice as a sentence, or None; None always, if the name does not tell which way is better.
        """
        higher = is_better_higher(name)
        if higher is None or not (math.isfinite(look.validation) and math.isfinite(look.training)):
            return None
        sign = -1.0 if higher else 1.0
        best = self._best.get(name)
        if best is None or sign * look.validation < sign * best.validation:
            self._best[name], self._since[name] = look, []
            self._advised.discard(name)
            return None
        since = self._since[name] = [*self._since[name], look][-self._patience :]
        if name in self._advised or len(since) < self._patience or not self._overfits(best, since, sign):
            return None
        self._advised.add(name)
        verbs = ("fallen", "rose") if higher else ("risen", "fell")
        now = "" if decay is None else f" (it is {decay:g})"
        return (
            f"{name} has {verbs[0]} from {best.validation:.4g} (step {best.step:,}) to {look.validation:.4g} (step "
            f"{look.step:,}) while {training_name} {verbs[1]} from {best.training:.4g} to {look.training:.4g}: what "
            f"the model has learnt since step {best.step:,} does not hold on data that it has not seen. Keep the "
            f"weights of that step (EarlyStopping, ModelCheckpoint), or train with more weight decay{now}, with "
            "dropout, or with more or augmented data."
        )

    def _overfits(self, best: Look, since: list[Look], sign: float) -> bool:
        worse = self._tolerance * abs(best.validation)
        better = self._tolerance * abs(best.training)
        rises = all(sign * (look.validation - best.validation) > worse for look in since)
        falls = all(sign * (best.training - look.training) > better for look in since)
        goes_on = sign * (since[-1].validation - since[0].validation) >= 0
        return rises and falls and goes_on


def gap_tags(names: Mapping[str, float]) -> dict[str, float]:
    """Return the tag of each gap, ``optim_generalization_gap/<quantity>``; the whole name where two share a quantity.

    Args:
        names: Gap by name of the validation metric.

    Example:
        >>> gap_tags({"val_loss": 0.5, "val/acc": 0.1})
        {'optim_generalization_gap/loss': 0.5, 'optim_generalization_gap/acc': 0.1}
    """
    quantities = [quantity_of(name) for name in names]
    found = {}
    for (name, gap), quantity in zip(names.items(), quantities, strict=True):
        shown = quantity if quantity and quantities.count(quantity) == 1 else name.replace("/", "_")
        found[f"optim_generalization_gap/{shown}"] = gap
    return found
