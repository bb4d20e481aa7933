"""Where each optimizer step took place: at which step of the run, from which batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_REMEMBERED = 64
"""Number of steps whose location is kept; the host learns of a step at most 8 steps later."""


@dataclass
class StepLocation:
    """Where one optimizer step took place.

    Args:
        step: Its place on the loggers' axis; -1 if that is not known any more.
        epoch: The epoch.
        batches: Indices of the batches of the epoch that made up the step.
        samples: The batches themselves, if they are kept.
    """

    step: int = -1
    epoch: int = -1
    batches: list[int] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)


class StepBatches:
    """The batches of each of the last steps of one optimizer, by the optimizer's number of the step.

    Args:
        count: Steps of the optimizer so far; not 0 in a resumed run.
        keep_samples: Whether to keep the batches themselves, to be saved.
    """

    def __init__(self, count: int, keep_samples: bool) -> None:
        self._keep = keep_samples
        self.restart(count)

    def restart(self, count: int) -> None:
        """Forget all locations, and count from ``count``."""
        self._count = count
        self._of: dict[int, StepLocation] = {}
        self._collecting = StepLocation()

    def add(self, step: int, epoch: int, index: int, batch: Any, count: int) -> bool:
        """Add a batch.

        Args:
            step: Present step on the loggers' axis.
            epoch: Present epoch.
            index: Index of the batch in the epoch.
            batch: The batch.
            count: Steps of the optimizer so far: as many as before, if batches are accumulated; several more, if it
                steps more than once per batch.

        Returns:
            Whether the optimizer has stepped since the last batch.
        """
        location = self._collecting
        location.step, location.epoch = step, epoch
        location.batches.append(index)
        if self._keep:
            location.samples.append(batch)
        if count == self._count:
            return False
        for old in [known for known in self._of if known <= self._count - _REMEMBERED]:
            del self._of[old]
        for number in range(self._count + 1, count + 1):
            self._of[number] = location
        self._count, self._collecting = count, StepLocation()
        return True

    def of(self, count: int) -> StepLocation:
        """Return the location of step number ``count``; that of the present batch, if the step has just happened."""
        return self._of.get(count) or (self._collecting if count > self._count else StepLocation())
