"""The space of a search: which hyperparameters, in which ranges, and under which conditions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_optim.core.suggest import nearest

Params = dict[str, Any]
"""Values of hyperparameters by their paths."""

_KEYS = ("low", "high", "log", "step", "choices", "when")
_SHORT = re.compile(r"(loguniform|uniform)\(\s*([^,()]+)\s*,\s*([^,()]+)\s*\)")


class SpaceError(ValueError):
    """A space that cannot be searched; the message is for users."""


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter with its range or its choices.

    Args:
        path: Its path, as a flag has it: ``optim.lr``.
        low: Lower end; None with choices.
        high: Upper end, included; None with choices.
        log: Whether values are drawn evenly in their logarithm.
        step: Distance of the values; None for all between the ends.
        whole: Whether values are integers.
        choices: The values to choose from; empty for a range.
        when: Paths of other hyperparameters, and the values with which this one is used.
    """

    path: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in the study: the path, and the condition if there is one."""
        if not self.when:
            return self.path
        return f"{self.path} ({', '.join(f'{path}={_or(values)}' for path, values in self.when.items())})"

    def applies(self, params: Mapping[str, Any]) -> bool:
        """Return whether it is used together with values of other hyperparameters."""
        return all(path in params and params[path] in values for path, values in self.when.items())

    def suggest(self, trial: Any) -> Any:
        """Return a value that a trial of Optuna, which may be a fixed one, has for it."""
        if self.choices:
            texts = {_text(choice): choice for choice in self.choices}
            return texts[trial.suggest_categorical(self.name, list(texts))]
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, int(self.low or 0), int(self.high or 0), step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def ends(self) -> tuple[Any, ...]:
        """Return the ends of its range, or its choices."""
        return self.choices or (self.low, self.high)

    def shown(self) -> str:
        """Return its range as text.

        Example:
            >>> Parameter("optim.lr", 1e-5, 1e-2, log=True).shown()
            '1e-05 to 0.01, log'
        """
        if self.choices:
            return ", ".join(_text(choice) for choice in self.choices)
        step = "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"


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
            parameters += [_parameter(path, each) for each in entries]
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
            {**{key: getattr(p, key) for key in fields}, "choices": [_text(c) for c in p.choices], "name": p.name}
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
        if isinstance(entry, Mapping) and entry and not any(name in entry for name in _KEYS):
            if all(isinstance(each, int | float | bool | None) for each in entry.values()):  # a misspelt range
                raise SpaceError(f"{path}: unknown key {next(iter(entry))!r}. {nearest(str(next(iter(entry))), _KEYS)}")
            yield from _flat(entry, f"{path}.")
        else:
            yield path, entry


def _parameter(path: str, entry: Any) -> Parameter:
    if isinstance(entry, str) and (short := _SHORT.fullmatch(entry.strip())):
        entry = {"low": short[2], "high": short[3], "log": short[1] == "loguniform"}
    if isinstance(entry, list | tuple):
        entry = {"choices": list(entry)}
    if not isinstance(entry, Mapping):
        raise SpaceError(
            f"{path}: {entry!r:.60} is one value. Give a range {{low: ..., high: ...}}, a list of choices or auto; a "
            f"fixed value is a flag: --{path} {entry}"
        )
    for key in entry:
        if key not in _KEYS:
            raise SpaceError(f"{path}: unknown key {key!r}. {nearest(str(key), _KEYS)}")
    when = _when(path, entry.get("when"))
    if "choices" in entry:
        if extra := [key for key in ("low", "high", "log", "step") if key in entry]:
            raise SpaceError(f"{path}: choices and {extra[0]} given; it is one or the other.")
        choices = entry["choices"]
        if not isinstance(choices, list | tuple) or not choices:
            raise SpaceError(f"{path}: choices must be a list of values, got {choices!r:.60}.")
        if len({_text(choice) for choice in choices}) < len(choices):
            raise SpaceError(f"{path}: a choice is given twice in {list(choices)!r:.80}.")
        return Parameter(path, choices=tuple(choices), when=when)
    return _range(path, entry, when)


def _range(path: str, entry: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]) -> Parameter:
    for key in ("low", "high"):
        if key not in entry:
            raise SpaceError(f"{path}: no {key!r}. A range is {{low: ..., high: ...}}, with log: true or step: ...")
    low, high = (_number(path, key, entry[key]) for key in ("low", "high"))
    step = None if entry.get("step") is None else _number(path, "step", entry["step"])
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{path}: log must be true or false, got {log!r:.40}.")
    if low >= high:
        raise SpaceError(f"{path}: low={low:g} must be below high={high:g}.")
    if log and low <= 0:
        raise SpaceError(f"{path}: low={low:g} must be above 0 with log: true.")
    if log and step is not None:
        raise SpaceError(f"{path}: log and step exclude each other.")
    if step is not None and not 0 < step <= high - low:
        raise SpaceError(f"{path}: step={step:g} must be above 0, and at most {high - low:g}.")
    whole = all(isinstance(each, int) for each in (low, high, 1 if step is None else step))
    return Parameter(path, low, high, log, step, whole, when=when)


def _number(path: str, key: str, value: Any) -> float:
    """A finite number; YAML reads 1e-5 as a text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise SpaceError(f"{path}: {key} must be a number, got {value!r:.40}.") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpaceError(f"{path}: {key} must be a finite number, got {value!r:.40}.")
    return value


def _when(path: str, given: Any) -> dict[str, tuple[Any, ...]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not given:
        raise SpaceError(f"{path}: when must be a mapping such as {{optim.optimizer: adamw}}, got {given!r:.40}.")
    return {str(key): tuple(value) if isinstance(value, list | tuple) else (value,) for key, value in given.items()}


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


def _text(choice: Any) -> str:
    """A choice as text: what any storage can hold, and any table can show."""
    return choice if isinstance(choice, str) else json.dumps(choice)


def _or(values: Sequence[Any]) -> str:
    return "|".join(map(str, values))
