"""A hyperparameter of a search: its range or its choices, and when it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.core.suggest import nearest

Params = dict[str, Any]
"""Values of hyperparameters by their paths."""

KEYS = ("low", "high", "log", "step", "choices", "when")
"""Keys of an entry."""
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
            texts = {text_of(choice): choice for choice in self.choices}
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
            return ", ".join(text_of(choice) for choice in self.choices)
        step = "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"


def read_parameter(path: str, entry: Any) -> Parameter:
    """Return the hyperparameter that an entry of a space describes.

    Args:
        path: Its path.
        entry: A list of choices, a mapping with the keys `KEYS`, or ``"loguniform(1e-4, 1e-2)"``.

    Raises:
        SpaceError: The entry is none of these, or a value is out of range.
    """
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
        if key not in KEYS:
            raise SpaceError(f"{path}: unknown key {key!r}. {nearest(str(key), KEYS)}")
    when = _when(path, entry.get("when"))
    if "choices" in entry:
        if extra := [key for key in ("low", "high", "log", "step") if key in entry]:
            raise SpaceError(f"{path}: choices and {extra[0]} given; it is one or the other.")
        choices = entry["choices"]
        if not isinstance(choices, list | tuple) or not choices:
            raise SpaceError(f"{path}: choices must be a list of values, got {choices!r:.60}.")
        if len({text_of(choice) for choice in choices}) < len(choices):
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


def text_of(choice: Any) -> str:
    """Return a choice as text, which any storage can hold and any table can show."""
    return choice if isinstance(choice, str) else json.dumps(choice)


def _or(values: Sequence[Any]) -> str:
    return "|".join(map(str, values))
