"""Ranges of hyperparameters, which each optimizer class declares."""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_optim.core.ranges import Range, ranges_of
from lightning_optim.optim import shared_options


def require_ranges(owner: type) -> None:
    """Refuse a class whose constructor takes a number without a range, and add those that annotations declare.

    An annotation `Annotated[float, Range(0, 1)]` declares a range next to its hyperparameter; it becomes an entry of
    `ranges` of the class. Shared options have their own checks.

    Raises:
        TypeError: A number has no range; the message shows how to declare one.
    """
    if annotated := _annotated_ranges(owner):
        owner.ranges = {**vars(owner).get("ranges", {}), **annotated}  # type: ignore[attr-defined]
    known = ranges_of(owner).keys() | shared_options.DEFAULTS.keys() | getattr(owner, "structured", set())
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
    refuse_unranged(owner, [p.name for p in parameters if p.name not in known and _is_number(p)])


def _annotated_ranges(owner: type) -> dict[str, Range]:
    """Return the ranges in the annotations of the constructor that ``owner`` itself defines."""
    own = vars(owner).get("__init__")
    annotations: dict[str, Any] = getattr(own, "__annotations__", {})
    found: dict[str, Range] = {}
    for name, annotation in annotations.items():
        if isinstance(annotation, str):
            if "Annotated[" not in annotation:
                continue
            annotation = eval(annotation, getattr(own, "__globals__", {}))  # as `typing.get_type_hints` does
        for extra in getattr(annotation, "__metadata__", ()):
            if isinstance(extra, Range):
                found[name] = extra
    return found


def refuse_unranged(owner: type, names: Iterable[str]) -> None:
    """Refuse the names of numbers without a range.

    Raises:
        TypeError: ``names`` is not empty.
    """
    for name in names:
        raise TypeError(
            f"{owner.__name__} takes the number {name!r}, but declares no range of valid values. Declare it in the "
            f'class body: ranges = {{"{name}": Range(0, 1, below=True)}} is 0 <= {name} < 1, Range() is any number but '
            "NaN; see lightning_optim.optim.Range."
        )


def _is_number(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    if parameter.default is None or parameter.default is parameter.empty:
        annotation = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
        return bool(re.search(r"\b(float|int)\b", annotation))
    return is_number(parameter.default)


def is_number(value: Any) -> bool:
    """Return whether a default is a number, or a tuple or list that has one."""
    if isinstance(value, tuple | list):
        return any(is_number(part) for part in value)
    return isinstance(value, numbers.Real | Tensor) and not isinstance(value, bool)
