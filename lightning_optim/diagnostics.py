"""Named quantities computed from the record of one step, on the device, one value per parameter group or one in all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.stats import StepCounts, StepRecord, sum_groups
from lightning_optim.transfer import PendingValues

__all__ = ["DEFAULT_DIAGNOSTICS", "ClippedGradNorm", "Diagnostic", "GradNorm", "ParamNorm", "Report", "UpdateRatio"]


class Diagnostic(ABC):
    """One quantity, shown as ``optim_<name>/<group>``.

    To add one, subclass, set `name`, and define `compute`.
    """

    name: str
    has_total = False
    """Whether `compute` gives one more value at the end, over all groups."""

    @abstractmethod
    def compute(self, record: StepRecord) -> Tensor:
        """The values, shape [groups], or [groups + 1] with a total; must not synchronise with the host."""


class GradNorm(Diagnostic):
    """Norm of the gradients before clipping, without the loss scale of 16-bit training."""

    name = "grad_norm"
    has_total = True

    def compute(self, record: StepRecord) -> Tensor:
        """‖g‖ per group, then over all."""
        return torch.cat([record.grad.group_norms(), record.grad.total_norm().reshape(1)])


class ClippedGradNorm(Diagnostic):
    """Norm of the gradients as the update used them."""

    name = "grad_norm_clipped"
    has_total = True

    def compute(self, record: StepRecord) -> Tensor:
        """‖g‖ per group, then over all."""
        sums = sum_groups(record.clipped_norm_sq, record.grad.group_sizes)
        return torch.cat([sums, sums.sum().reshape(1)]).sqrt()


class ParamNorm(Diagnostic):
    """Norm of the parameters before the step."""

    name = "param_norm"

    def compute(self, record: StepRecord) -> Tensor:
        """‖p‖ per group."""
        return record.update.groups("param_sq").sqrt()


class UpdateRatio(Diagnostic):
    """By what share of their norm the step changed the parameters; NaN where all of a group's parameters are zero.

    A rule of thumb for a healthy run is 1e-3 (Karpathy, CS231n notes); watch a group against its own history.
    """

    name = "update_ratio"

    def compute(self, record: StepRecord) -> Tensor:
        """‖Δp‖ / ‖p‖ per group."""
        return (record.update.groups("update_sq") / record.update.groups("param_sq")).sqrt()


DEFAULT_DIAGNOSTICS: tuple[Diagnostic, ...] = (GradNorm(), ClippedGradNorm(), ParamNorm(), UpdateRatio())
_HYPERPARAMETERS = ("lr", "weight_decay")
_START = StepCounts()


class Report:
    """The diagnostics of one step on their way to the host, in one packed transfer.

    Args:
        record: The step.
        diagnostics: What to compute.
        since: The report before this one, or the counts at the start; rates are over the steps from there.
        at: Where on the loggers' axis the step belongs.
    """

    def __init__(
        self,
        record: StepRecord,
        diagnostics: Sequence[Diagnostic],
        since: Report | StepCounts = _START,
        at: int = 0,
    ) -> None:
        self.at = at
        self.steps = record.steps
        self.clipped = 0
        self._since: Report | StepCounts = since
        self._known: dict[str, float] = {}
        self._tags = ["clipped", "skipped"]
        columns = [record.counts.to(torch.float64)]
        for diagnostic in diagnostics:
            names = [*record.group_names, "total"] if diagnostic.has_total else record.group_names
            self._tags += [f"optim_{diagnostic.name}/{name}" for name in names]
            columns.append(diagnostic.compute(record).to(torch.float64))
        for name, group in zip(record.group_names, record.hyperparameters, strict=True):
            for key in _HYPERPARAMETERS:
                if isinstance(value := group.get(key), Tensor):
                    self._tags.append(f"optim_{key}/{name}")
                    columns.append(value.detach().reshape(1).to(columns[0].device, torch.float64))
                elif value is not None:
                    self._known[f"optim_{key}/{name}"] = float(value)
        self._pending = PendingValues(torch.cat(columns))

    def ready(self) -> bool:
        """Whether reading would not have to wait."""
        return self._pending.ready()

    def read(self) -> dict[str, float]:
        """Every value under its tag. Reports are read in order, because rates are differences."""
        values = dict(zip(self._tags, self._pending.read(), strict=True))
        self.clipped, skipped = int(values.pop("clipped")), values.pop("skipped")
        clip_rate = (self.clipped - self._since.clipped) / (self.steps - self._since.steps)
        self._since = _START  # read once: a chain of reports would keep the whole run alive
        health = {"optim_health/clip_rate": clip_rate, "optim_health/skipped_steps": skipped}
        return {**self._known, **values, **health}
