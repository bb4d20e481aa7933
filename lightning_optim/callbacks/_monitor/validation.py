"""Looks at the logged metrics after each validation: the gap to training, and advice where they part."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._lightning import logging_step
from lightning_optim.callbacks._monitor.settings import main_settings
from lightning_optim.diagnostics.generalization import Generalization, Look, gap_tags
from lightning_optim.diagnostics.metric_names import quantity_of, split_of, training_name

_MOST_OBSERVED = 1000
OWN_LOSS = "optim_loss/mean"
"""Stands for the training loss where the module logs none."""


def metric_tags(trainer: L.Trainer) -> list[str]:
    """Return the names of the metrics that the module has logged to loggers, of training and of validation."""
    return [name for name in trainer.logged_metrics if split_of(name) in ("training", "validation")]


class ValidationLooks:
    """Pairs of validation and training metrics, as the module logs them.

    Lightning has the values of an epoch of training only when that is over, after its validation. So a look is complete
    at the next batch, or at the end of training.

    Args:
        trainer: The Trainer, when training begins.
        patience: As for `Generalization`.
    """

    def __init__(self, trainer: L.Trainer, patience: int) -> None:
        self._trainer = trainer
        self._watch = Generalization(patience)
        self._observed: dict[str, deque[Tensor]] = {}
        self._losses: list[float] = []
        self._open: tuple[int, list[str]] | None = None

    def observe(self) -> None:
        """Note the training metrics of a logging step, on the device."""
        for name, value in self._trainer.callback_metrics.items():
            if split_of(name) in ("training", "") and isinstance(value, Tensor) and value.numel() == 1:
                self._observed.setdefault(name, deque(maxlen=_MOST_OBSERVED)).append(value.detach())

    def observe_loss(self, loss: float | None) -> None:
        """Note the mean loss of a report that has arrived."""
        if loss is not None:
            self._losses.append(loss)

    def validated(self) -> None:
        """Note that a validation has ended."""
        if self._trainer.sanity_checking:
            return
        names = [name for name in self._trainer.callback_metrics if split_of(name) == "validation"]
        self._open = logging_step(self._trainer), names

    def complete(self) -> tuple[int, dict[str, float], list[str]] | None:
        """Compare validation with training, if there has been a validation since the last call.

        Returns:
            The step of the validation, the gaps by tag, and advice; None if there has been none.
        """
        if self._open is None:
            return None
        (step, names), self._open = self._open, None
        found_in: dict[str, Any] = dict(self._trainer.callback_metrics)
        metrics = {n: v for n, v in found_in.items() if isinstance(v, Tensor) and v.numel() == 1}
        gaps: dict[str, float] = {}
        advice = []
        for name in names:
            found = self._training(name, metrics) if name in metrics else None
            if found is None:
                continue
            look = Look(step, float(metrics[name]), found[1])
            gaps[name] = self._watch.gap(name, look)
            if (text := self._watch.update(name, found[0], look, self._decay())) is not None:
                advice.append(text)
        self._observed.clear()
        self._losses.clear()
        return step, gap_tags(gaps), advice

    def _training(self, validation: str, metrics: dict[str, Tensor]) -> tuple[str, float] | None:
        """Return name and value of the training metric of a validation metric, over the time since the last look."""
        name = training_name(validation, metrics)
        if name is None:
            if quantity_of(validation) == "loss" and self._losses:
                return OWN_LOSS, sum(self._losses) / len(self._losses)
            return None
        seen = self._observed.get(name, ())
        values = torch.stack([value.reshape(()).to(metrics[name].device) for value in seen]).tolist() if seen else []
        # A value that changed between logging steps is of single batches; one that did not is that of an epoch.
        return name, sum(values) / len(values) if len(set(values)) > 1 else float(metrics[name])

    def _decay(self) -> float | None:
        decays = [main_settings(bare(optimizer))["weight_decay"] for optimizer in self._trainer.optimizers]
        known = [decay for decay in decays if decay is not None]
        return max(known) if known else None
