"""The interface of diagnostics: named quantities of one step, computed on the device from the step's record."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_optim.core.stats import StepRecord


class Diagnostic(ABC):
    """One quantity, shown as ``optim_<name>/<group>``.

    To add one, subclass, set `name`, and define `compute`; hand an instance to ``OptimizerMonitor(diagnostics=[...])``,
    or its name after `lightning_optim.register`. A slash in the name puts several quantities into one section of
    TensorBoard: ``grad/zero`` reads ``optim_grad/zero/<group>``.
    """

    name: str
    has_total = False
    """Whether `compute` gives one more value at the end, over all groups."""
    per_group = True
    """Whether there is a value for each group; without these and without a total, the tag is ``optim_<name>``."""
    shows_nan = False
    """Whether a NaN is written as a point; else it means that there is no such quantity, and nothing is written."""

    @abstractmethod
    def compute(self, record: StepRecord) -> Tensor:
        """Return the values, without synchronising with the host.

        Args:
            record: The record of the step.

        Returns:
            Shape [groups], or [groups + 1] with a total, on the device of the record.
        """

    def tags(self, record: StepRecord) -> list[str]:
        """Return the tag of each value that `compute` returns."""
        names = [*(record.group_names if self.per_group else ()), *(["total"] if self.has_total else [])]
        return [f"optim_{self.name}/{name}" for name in names] or [f"optim_{self.name}"]
