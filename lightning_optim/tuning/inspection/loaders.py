"""The first batches of data that are not to notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


def first_batches(data: Any, count: int) -> Iterator[Any]:
    """Yield the first batches.

    Args:
        data: Anything that can be iterated more than once.
        count: Their number.

    Raises:
        TypeError: It is an iterator, whose batches would be lost for the training, or nothing to iterate.
    """
    yield from islice(iter(independent(data)), count)


def independent(data: Any) -> Any:
    """Return the data such that to iterate does not disturb an iteration that goes on.

    A DataLoader is copied without its present iterator and without workers, so that the look starts no processes.

    Args:
        data: A DataLoader, or another iterable.

    Raises:
        TypeError: See `first_batches`.
    """
    dataset = getattr(data, "dataset", None)
    for each, what in ((data, "the data"), (dataset, "its dataset")):
        if hasattr(each, "__next__"):
            raise TypeError(
                f"Invalid data: {what} is an iterator ({type(each).__name__}), and the batches of the look would be "
                "missing in training. Give a DataLoader, a list of batches, or an object whose __iter__ starts anew."
            )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(f"Invalid data={data!r:.60}: must be a DataLoader, a list of batches or another iterable.")
    if isinstance(data, DataLoader):
        loader = copy.copy(data)
        vars(loader).update(_iterator=None, num_workers=0, prefetch_factor=None, timeout=0, persistent_workers=False)
        return loader
    return data
