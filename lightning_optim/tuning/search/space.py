"""The space of a search: which hyperparameters, in which ranges, and under which conditions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.tuning.search.parameter import KEYS, Parameter, Params, SpaceError, read_parameter, text_of


class Space:
    """The hyperparameters of a search.

    Args:
        parameters: The hyperparameters.

    Raises:
        SpaceError: There is none, or a condition asks for what is not searched.

    Example:
        >>> space = Space.read({"optim.lr": "loguniform(1e-4, 1e-2)", "optim.optimizer": ["adamw", "lion"]})
        >>> [parameter.name for parameter in space]
        ['optim.lr', 'optim.optimizer']
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        if not parameters:
            raise SpaceError("The space is empty: it needs a hyperparameter, for instance `optim.lr: auto`.")
        self._parameters = _ordered(parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._parameters)

    @classmethod
    def read(cls, data: Mapping[str, Any], known: Callable[[str, Any], list[Any]] | None = None) -> Space:
        """Read a space as a file has it.

        Args:
            data: Paths and what to search: ``{low, high}`` with ``log`` and ``step``, ``{choices}``, a list of choices,
                ``"loguniform(1e-5, 1e-2)"``, ``"auto"``, or a list of mappings that each have a condition ``when``.
            known: Returns the entries of a path that is ``auto``, given the whole space; None if there is none.

        Raises:
            SpaceError: An entry is none of these, has a misspelt key, or its ends are in the wrong order.
        """
        if not isinstance(data, Mapping):
            raise SpaceError(f"The space must be a mapping from paths such as optim.lr to ranges, not {data!r:.60}.")
        flat = dict(_flat(data, ""))
        parameters: list[Parameter] = []
        for path, entry in flat.items():
            entries = [entry]
            if entry == "auto":
                if known is None:
                    raise SpaceError(f"{path}: no range is known for it; give low and high, or choices.")
                entries = known(path, flat)
            elif isinstance(entry, list) and entry and all(isinstance(e, Mapping) and "when" in e for e in entry):
                entries = entry
            parameters += [read_parameter(path, each) for each in entries]
        return cls(parameters)

    def suggest(self, trial: Any) -> Params:
        """Return the values of a trial of Optuna.

        Args:
            trial: The trial; or one with fixed values.
        """
        params: Params = {}
        for parameter in self._parameters:
            if parameter.applies(params):
                params[parameter.path] = parameter.suggest(trial)
        return params

    def corners(self) -> Iterator[tuple[Parameter | None, Any, Params]]:
        """Return few sets of values that between them have each end of each range, and each choice.

        Yields:
            A hyperparameter, one of its ends or choices, and values for all of those on which it depends; first, with
            None in their place, the same several at a time.
        """
        alone = [(p, end, {**self._reach(p), p.path: end}) for p in self._parameters for end in p.ends()]
        joint: list[Params] = []
        for _, _, params in alone:
            fits = (
                each
                for each in joint
                if all(each.get(path, value) == value for path, value in params.items())
                and self._consistent({**each, **params})
            )
            found = next(fits, None)
            if found is None:
                joint.append(dict(params))
            else:
                found.update(params)
        for params in joint:
            yield None, None, params
        yield from alone

    def _consistent(self, params: Params) -> bool:
        """Whether all values are of hyperparameters that are used together."""
        return all(any(p.path == path and p.applies(params) for p in self._parameters) for path in params)

    def _reach(self, parameter: Parameter) -> Params:
        """Values under which a hyperparameter is used."""
        found: Params = {}
        for path, values in parameter.when.items():
            above = next(p for p in self._parameters if p.path == path)
            found |= {**self._reach(above), path: values[0]}
        return found

    @property
    def size(self) -> float:
        """The number of points of a grid; infinite if a range has no step."""
        count = 1.0
        for parameter in self._parameters:
            if parameter.choices:
                count *= len(parameter.choices)
            elif parameter.whole or parameter.step:
                assert parameter.low is not None
                assert parameter.high is not None
                count *= (parameter.high - parameter.low) // (parameter.step or 1) + 1
            else:
                return math.inf
        return count

    def described(self) -> list[dict[str, Any]]:
        """Return the space as data for JSON, by which a study is recognised."""
        fields = ("path", "low", "high", "log", "step", "whole")
        return [
            {**{key: getattr(p, key) for key in fields}, "choices": [text_of(c) for c in p.choices], "name": p.name}
            for p in self._parameters
        ]

    def with_whole(self, is_whole: Callable[[Parameter], bool]) -> Space:
        """Return the space with integers only where a hyperparameter takes nothing else.

        Args:
            is_whole: Asked for each hyperparameter whose ends are integers.
        """
        return Space([replace(p, whole=is_whole(p)) if p.whole else p for p in self._parameters])


def _flat(data: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Paths and entries; sections may be nested as in a configuration."""
    for key, entry in data.items():
        if not isinstance(key, str):
            raise SpaceError(f"The space has the key {key!r}: it must be a path such as optim.lr.")
        path = f"{above}{key}".removeprefix("--")
        if isinstance(entry, Mapping) and entry and not any(name in entry for name in KEYS):
            if all(isinstance(each, int | float | bool | None) for each in entry.values()):  # a misspelt range
                raise SpaceError(f"{path}: unknown key {next(iter(entry))!r}. {nearest(str(next(iter(entry))), KEYS)}")
            yield from _flat(entry, f"{path}.")
        else:
            yield path, entry


def _ordered(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Each behind those on which it depends, which must be searched and have the value asked for."""
    by_path: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        by_path.setdefault(parameter.path, []).append(parameter)
    for path, several in by_path.items():
        for one, other in itertools.combinations(several, 2):
            if not any(key in other.when and not set(one.when[key]) & set(other.when[key]) for key in one.when):
                raise SpaceError(f"{path}: two entries apply at once; their conditions `when` must exclude each other.")
        for parameter in several:
            _check_condition(parameter, by_path)
    found: list[Parameter] = []
    left = list(parameters)
    while left:
        ready = [p for p in left if not any(path in {other.path for other in left} for path in p.when)]
        if not ready:
            raise SpaceError(f"The conditions of {', '.join(p.path for p in left)} depend on each other in a circle.")
        found += ready
        left = [p for p in left if p not in ready]
    return found


def _check_condition(parameter: Parameter, by_path: Mapping[str, Sequence[Parameter]]) -> None:
    for path, values in parameter.when.items():
        if path not in by_path:
            raise SpaceError(f"{parameter.path}: when asks for {path}, which is not searched. {nearest(path, by_path)}")
        choices = [choice for above in by_path[path] for choice in above.choices]
        if not choices:
            raise SpaceError(f"{parameter.path}: when asks for a value of {path}, which is a range: it needs choices.")
        for value in values:
            if value not in choices:
                raise SpaceError(
                    f"{parameter.path}: when asks for {path}={value}, which is none of its choices. "
                    f"{nearest(str(value), [str(choice) for choice in choices])}"
                )
