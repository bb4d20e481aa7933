"""Hyperparameters that somebody else has written into the groups since a scheduler set them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.schedules.hyperparameters import Hyperparameter

Group = dict[str, Any]


class Written:
    """The values of one hyperparameter as a scheduler has left them in the groups.

    A value that is a tensor is compared by its version, which every write in place counts up: the host does not wait
    for a device.

    Args:
        hyperparameter: Which one.

    Example:
        >>> from lightning_optim.schedules.hyperparameters import LR
        >>> groups = [{"lr": 0.1}, {"lr": 0.2}]
        >>> written = Written(LR)
        >>> written.record(groups)
        >>> groups[1]["lr"] = 0.05
        >>> [index for index, _ in written.changed(groups)]
        [1]
    """

    def __init__(self, hyperparameter: Hyperparameter) -> None:
        self._of = hyperparameter
        self._groups: list[Group] = []
        self._values: list[Any] = []
        self._versions: list[int | None] = []
        self._has_tensors = False

    def record(self, groups: Sequence[Group]) -> None:
        """Remember the present values."""
        self._groups = list(groups)
        self._values = self._read(groups)
        self._has_tensors = any(issubclass(kind, Tensor) for kind in set(map(type, self._values)))
        self._versions = [_version(value) for value in self._values] if self._has_tensors else []

    def forget(self) -> None:
        """Take whatever is in the groups as it is: a state has been loaded."""
        self._groups, self._values, self._versions = [], [], []

    def changed(self, groups: Sequence[Group]) -> Iterator[tuple[int, Group]]:
        """Yield place and group of each group whose value is another one now; groups that are new are left out."""
        if not self._groups:
            return
        present = self._read(groups)
        if not self._has_tensors and present == self._values:  # nearly always
            return
        known = {id(group): place for place, group in enumerate(self._groups)}
        for index, (group, value) in enumerate(zip(groups, present, strict=True)):
            place = known.get(id(group))
            if place is None:
                continue
            before = self._values[place]
            is_tensor = isinstance(value, Tensor) or isinstance(before, Tensor)
            same = value is before and _version(value) == self._versions[place] if is_tensor else value == before
            if not same:
                yield index, group

    def _read(self, groups: Sequence[Group]) -> list[Any]:
        key, part = self._of.key, self._of.index
        if part is None:
            return [group[key] for group in groups]
        return [group[key][part] for group in groups]


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) else None
