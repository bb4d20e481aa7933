"""Where each step of an optimizer was: at which step of the run, in which batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_REMEMBERED = 64
"""Of so many steps it is known where they were; the host hears of a step at most 8 later."""


@dataclass
class StepLocation:
    """Where a step was.

    Args:
        step: On the loggers' axis; -1 if that is not known any more.
        epoch: In which epoch.
        batches: Which batches of it made up the step.
        samples: The batches themselves, if they are kept.
    """

    step: int = -1
    epoch: int = -1
    batches: list[int] = field(default_factory=list)
    samples: list[Any] = field(default_factory=list)


class StepBatches:
    """Collects the batches of each step of one optimizer, and knows them again by the optimizer's number of the step.

    Args:
        count: Steps so far; not 0 in a run that goes on from a checkpoint.
        keep_samples: Whether to keep the batches themselves, to be saved.
    """

    def __init__(self, count: int, keep_samples: bool) -> None:
        self._keep = keep_samples
        self.restart(count)

    def restart(self, count: int) -> None:
        """Goes on from another number of steps."""
        self._count = count
        self._of: dict[int, StepLocation] = {}
        self._collecting = StepLocation()

    def note(self, step: int, epoch: int, index: int, batch: Any, count: int) -> bool:
        """Takes in a batch.

        Args:
            step: Present step on the loggers' axis.
            epoch: Present epoch.
            index: Which batch of it.
            batch: The batch.
            count: Steps of the optimizer so far: as many as before, if batches are accumulated; several more, if it
                steps more than once per batch.

        Returns:
            Whether there was a step since the last batch.
        """
        place = self._collecting
        place.step, place.epoch = step, epoch
        place.batches.append(index)
        if self._keep:
            place.samples.append(batch)
        if count == self._count:
            return False
        for old in [known for known in self._of if known <= self._count - _REMEMBERED]:
            del self._of[old]
        for number in range(self._count + 1, count + 1):
            self._of[number] = place
        self._count, self._collecting = count, StepLocation()
        return True

    def of(self, count: int) -> StepLocation:
        """Where the step of that number was; a step that no batch has ended with yet is where it is now."""
        return self._of.get(count) or (self._collecting if count > self._count else StepLocation())
