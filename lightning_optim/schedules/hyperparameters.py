"""The hyperparameters that a schedule can set, and how they are read and written in a parameter group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_optim.core.ranges import Range
from lightning_optim.core.suggest import nearest

_NO_RANGES: Mapping[str, Range] = MappingProxyType({})
_IN_BETAS = {"momentum": 0, "beta1": 0, "beta2": 1, "beta3": 2}
"""Names for the elements of ``betas``; ``momentum`` is the name in torch's OneCycleLR."""


@dataclass(frozen=True)
class Hyperparameter:
    """A number in each parameter group.

    Args:
        name: A key of the group, or ``momentum``, ``beta1``, ``beta2``, ``beta3`` for an element of ``betas``.
        key: Key of the group.
        index: Index into the key's value; None for the whole value.
        range: Range that the class of the optimizer declares for it; None for the usual one.
    """

    name: str
    key: str
    index: int | None = None
    range: Range | None = None

    @property
    def base_key(self) -> str:
        """Key of the group for the value that the schedule multiplies; ``initial_lr`` is torch's name."""
        return f"initial_{self.name}"

    def read(self, group: Mapping[str, Any]) -> float | Tensor:
        """Return the present value; a tensor of shape [] is copied."""
        value = group[self.key] if self.index is None else group[self.key][self.index]
        return value.clone() if isinstance(value, Tensor) else value

    def write(self, group: dict[str, Any], value: float | Tensor) -> None:
        """Set the value; a tensor keeps its storage, because the optimizer may hold a reference to it."""
        if self.index is not None:
            parts = list(group[self.key])
            parts[self.index] = value
            group[self.key] = tuple(parts)
        elif isinstance(group[self.key], Tensor):
            group[self.key].fill_(value)
        else:
            group[self.key] = value

    def base(self, group: dict[str, Any]) -> float | Tensor:
        """Return the value that the schedule multiplies, which is the group's initial value."""
        if self.base_key not in group:
            group[self.base_key] = self.read(group)
        base: float | Tensor = group[self.base_key]
        return base

    def check(self, value: float) -> None:
        """Check a value that a schedule would set.

        Args:
            value: The value.

        Raises:
            ValueError: The value is out of the declared range; without one, it is negative, not finite, or at least 1
                for one of ``betas``.
        """
        if self.range is not None and value not in self.range:
            raise ValueError(
                f"The schedule of {self.name} would set it to {value:g}; it must be {self.range.needed(self.name)}."
            )
        below_one = self.name in _IN_BETAS
        if not (math.isfinite(value) and (value >= 0 or self.range is not None) and (value < 1 or not below_one)):
            raise ValueError(
                f"The schedule of {self.name} would set it to {value:g}; it must be finite and at least 0"
                f"{' and below 1' if below_one else ''}."
            )


LR = Hyperparameter("lr", "lr")


def hyperparameter(
    name: str, defaults: Mapping[str, Any], owner: str, ranges: Mapping[str, Range] = _NO_RANGES
) -> Hyperparameter:
    """Find the hyperparameter called ``name`` of an optimizer with these defaults.

    Args:
        name: A key of the groups that holds a number, or ``momentum``, ``beta1``, ``beta2``, ``beta3``.
        defaults: The optimizer's defaults.
        owner: Name of the optimizer in the message.
        ranges: Ranges that the optimizer declares, by name.

    Returns:
        The hyperparameter.

    Raises:
        ValueError: The optimizer has none of that name, or the name is ``lr``, whose schedule is given separately.

    Example:
        >>> hyperparameter("momentum", {"lr": 0.1, "betas": (0.9, 0.99)}, "AdamW")
        Hyperparameter(name='momentum', key='betas', index=0, range=None)
    """
    if name == "lr":
        raise ValueError("Invalid key 'lr' in schedules: give the schedule of lr as `schedule`.")
    parts = len(defaults["betas"]) if "betas" in defaults else 0
    found = {key: Hyperparameter(key, "betas", index) for key, index in _IN_BETAS.items() if index < parts}
    found |= {
        key: Hyperparameter(key, key, range=ranges.get(key))
        for key, value in defaults.items()
        if _is_number(value) and key != "lr"
    }
    if name not in found:
        raise ValueError(f"{owner} has no hyperparameter {name!r} to schedule. {nearest(name, found)}")
    return found[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
