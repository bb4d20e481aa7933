"""The interface of diagnostics: named quantities of one step, computed on the device from the step's record."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_optim.core.stats import StepRecord


class Diagnostic(ABC):
    """One quantity, shown as ``optim_<name>/<group>``.

    To add one, subclass, set `name`, and define `compute`; pass an instance to ``OptimizerMonitor(diagnostics=[...])``,
    or its name after `lightning_optim.register`. A slash in the name puts several quantities into one section of
    TensorBoard: the tag of ``grad/zero`` is ``optim_grad/zero/<group>``.
    """

    name: str
    has_total = False
    """Whether `compute` returns one more value at the end, over all groups."""
    per_group = True
    """Whether `compute` returns a value for each group; with neither these nor a total, the tag is ``optim_<name>``."""
    shows_nan = False
    """Whether a NaN is logged; otherwise it means that the quantity does not exist, and nothing is logged."""

    @abstractmethod
    def compute(self, record: StepRecord) -> Tensor:
        """Compute the values without synchronising with the host.

        Args:
            record: The record of the step.

        Returns:
            Shape [groups], or [groups + 1] with a total, on the device of the record.
        """

    def tags(self, record: StepRecord) -> list[str]:
        """Return the tag of each value that `compute` returns."""
        names = [*(record.group_names if self.per_group else ()), *(["total"] if self.has_total else [])]
        return [f"optim_{self.name}/{name}" for name in names] or [f"optim_{self.name}"]
