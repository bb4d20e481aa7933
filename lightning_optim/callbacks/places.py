"""Where each optimizer step was: at which step of the run, in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_REMEMBERED = 64
"""Of so many steps it is known where they were; the host hears of a step at most 8 later."""
_MOST_FILES = 16
"""So many steps' batches are saved at most."""


@dataclass
class Place:
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


class Places:
    """Collects the batches of each step, and knows them again by the optimizer's own number of the step.

    Args:
        counts: Steps of each optimizer so far; not 0 in a run that goes on from a checkpoint.
        keep_samples: Whether to keep the batches themselves, to be saved.
    """

    def __init__(self, counts: Sequence[int], keep_samples: bool) -> None:
        self._of: list[dict[int, Place]] = [{count: Place()} for count in counts]
        self._keep = keep_samples
        self._collecting = Place()
        self._files = 0

    def note(self, step: int, epoch: int, index: int, batch: Any, counts: Sequence[int]) -> bool:
        """Takes in a batch.

        Args:
            step: Present step on the loggers' axis.
            epoch: Present epoch.
            index: Which batch of it.
            batch: The batch.
            counts: Steps of each optimizer so far.

        Returns:
            Whether there was a step since the last batch.
        """
        place = self._collecting
        place.step, place.epoch = step, epoch
        place.batches.append(index)
        if self._keep:
            place.samples.append(batch)
        stepped = [known for known, count in zip(self._of, counts, strict=True) if count not in known]
        for known, count in zip(self._of, counts, strict=True):
            known.setdefault(count, place)
            known.pop(count - _REMEMBERED, None)
        if stepped:
            self._collecting = Place()
        return bool(stepped)

    def of(self, optimizer: int, count: int) -> Place:
        """Where an optimizer's step of that number was."""
        return self._of[optimizer].get(count) or Place()

    def save(self, place: Place, folder: Path, rank: int) -> None:
        """Writes the batches of a step, unless there are enough."""
        if place.samples and self._files < _MOST_FILES:
            self._files += 1
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(place.samples, folder / f"step{place.step}_rank{rank}.pt")
