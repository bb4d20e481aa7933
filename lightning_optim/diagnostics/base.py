"""What a diagnostic is: a named quantity of one step, computed on the device from the step's record."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_optim.core.stats import StepRecord


class Diagnostic(ABC):
    """One quantity, shown as ``optim_<name>/<group>``.

    To add one, subclass, set `name`, and define `compute`. A slash in the name puts several quantities into one
    section of TensorBoard: ``grad/zero`` reads ``optim_grad/zero/<group>``.
    """

    name: str
    has_total = False
    """Whether `compute` gives one more value at the end, over all groups."""
    per_group = True
    """Whether there is a value for each group; without, and without a total, the tag is ``optim_<name>``."""
    shows_nan = False
    """Whether a NaN is worth a point. Else it says that there is no such quantity, and no point is written."""

    @abstractmethod
    def compute(self, record: StepRecord) -> Tensor:
        """The values, shape [groups], or [groups + 1] with a total; must not synchronise with the host."""

    def tags(self, record: StepRecord) -> list[str]:
        """The tag of each value."""
        names = [*(record.group_names if self.per_group else ()), *(["total"] if self.has_total else [])]
        return [f"optim_{self.name}/{name}" for name in names] or [f"optim_{self.name}"]
