"""Checks of hyperparameters by the ranges that an optimizer declares, and of names that may be misspelt."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.core.group_keys import GROUP_KEYS, PARAMS
from lightning_optim.core.ranges import Range
from lightning_optim.core.suggest import nearest


def plain_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert real scalars of any type (numpy scalars, fractions) to int or float, which checkpoints can hold.

    Returns:
        ``values`` with every such scalar converted, also inside tuples and lists.
    """
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_plain(part) for part in value)
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def own_tensors(groups: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """Replace in the last of ``groups`` each tensor among ``names`` that an earlier group shares by a copy."""
    last = groups[-1]
    for name in names:
        value = last.get(name)
        if isinstance(value, Tensor) and any(group.get(name) is value for group in groups[:-1]):
            last[name] = value.detach().clone()


def check_lengths(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that each hyperparameter whose default is a tuple has the same length, and that no other is a list.

    Args:
        owner: Name of the optimizer, for messages.
        group: The complete parameter group.
        defaults: Defaults of the hyperparameters.

    Raises:
        ValueError: A hyperparameter is not a tuple or list of that length, or is one and should not be.
    """
    for name, default in defaults.items():
        given = group.get(name)
        if not isinstance(default, tuple):
            if isinstance(given, tuple | list):
                raise ValueError(f"{_where(owner, group)}Invalid {name}={given!r}: must be one value, not a list.")
            continue
        if not isinstance(given, tuple | list):
            raise ValueError(f"{_where(owner, group)}Invalid {name}={given!r}: must be {len(default)} numbers.")
        if len(given) != len(default):
            raise ValueError(
                f"{_where(owner, group)}Invalid {name}={given}: must be {len(default)} numbers, not {len(given)}."
            )


def number(owner: str, group: Mapping[str, Any], name: str) -> float:
    """Return the hyperparameter ``name``, a number or a one-element tensor, as a float.

    Raises:
        ValueError: The value is neither a number nor a one-element tensor.
    """
    value = group[name]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(
                f"{_where(owner, group)}Invalid {name} of shape {shape}: must be a number or a one-element tensor."
            )
        return float(value.detach())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise ValueError(f"{_where(owner, group)}Invalid {name}={value!r} of type {kind}: must be a number.")
    return float(value)


def check_values(
    owner: str, group: Mapping[str, Any], ranges: Mapping[str, Range], defaults: Mapping[str, Any]
) -> None:
    """Check each hyperparameter by itself: numbers by their range, flags by their type.

    Args:
        owner: Name of the optimizer, for messages.
        group: The complete parameter group.
        ranges: Range of each number.
        defaults: Defaults of the hyperparameters; those that are True or False are flags.

    Raises:
        ValueError: A value is not valid; the message has the given value and the requirement.
    """
    where = _where(owner, group)
    check_numbers(owner, group, ranges)
    check_numbers(owner, group, {name: key.range for name, key in GROUP_KEYS.items() if key.range is not None})
    for name, default in defaults.items():
        if isinstance(default, bool) and not isinstance(group.get(name, False), bool):
            raise ValueError(f"{where}Invalid {name}={group[name]!r}: must be True or False.")
    if group["weight_decay_kind"] in ("independent", "corrected") and group["weight_decay"] and not group["peak_lr"]:
        raise ValueError(
            f"{where}weight_decay_kind={group['weight_decay_kind']!r} divides by the peak learning rate, which is "
            "by default lr at construction, here 0. Give the group its 'peak_lr'."
        )


def check_numbers(owner: str, group: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Check the numbers of ``group`` that have a range.

    Args:
        owner: Name of the optimizer, for messages.
        group: The parameter group.
        ranges: Range of each number.

    Raises:
        ValueError: A number is out of its range; the message has the given value and the requirement.
    """
    for name, given, allowed in _parts(group, ranges):
        _check_number(owner, group, name, given, allowed)


def _check_number(owner: str, group: Mapping[str, Any], name: str, given: Any, allowed: Range) -> None:
    if given is None and allowed.optional:
        return
    if isinstance(given, Tensor) and not allowed.tensor:
        raise ValueError(f"{_where(owner, group)}Invalid {name} of type {type(given).__name__}: must be a number.")
    if allowed.whole and not (isinstance(given, int) and not isinstance(given, bool) and given in allowed):
        raise ValueError(f"{_where(owner, group)}Invalid {name}={given!r}: must be {allowed.needed(name)}.")
    value = number(owner, {**group, name: given}, name)
    if value not in allowed:
        raise ValueError(f"{_where(owner, group)}Invalid {name}={value}: must be {allowed.needed(name)}.")


def _parts(group: Mapping[str, Any], ranges: Mapping[str, Range]) -> Iterator[tuple[str, Any, Range]]:
    """Yield name, value and range of each number of ``group``, and of each element of a tuple (`betas[0]`)."""
    for name, allowed in ranges.items():
        if name not in group:
            continue
        value = group[name]
        if isinstance(value, tuple | list):
            yield from ((f"{name}[{i}]", part, allowed) for i, part in enumerate(value))
        else:
            yield name, value, allowed


def refuse_typos(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keys of a parameter group that are similar, but not equal, to the name of a hyperparameter.

    Groups may hold keys of the user, so a key that is not similar to any hyperparameter is accepted.

    Raises:
        ValueError: A key may be misspelt; the message suggests the nearest name.
    """
    known = [name for name in known if name not in PARAMS]
    for key in given:
        if key not in known and key not in GROUP_KEYS and difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise ValueError(f"{owner}: parameter group has an unknown key {key!r}. {nearest(key, known)}")


def _where(owner: str, group: Mapping[str, Any]) -> str:
    return f"{owner}, group {group['name']!r}: " if "name" in group else f"{owner}: "
