"""Changes of single arguments in a list of callbacks, as plain data: what a flag such as ``--optim.lr`` means there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lightning_optim.core.suggest import nearest

BY_NAME = {"optimizer": "optimizer_kwargs", "method": "method_kwargs"}
"""Arguments that may be the name of a component, and the argument that takes the component's own arguments."""

OF_COMPONENT = {"lr": "optimizer", "weight_decay": "optimizer", "warmup": "schedule"}
"""Arguments that may be written within a component: ``schedule: {class_path: ..., init_args: {warmup: ...}}``."""


class ChangeError(ValueError):
    """A change that does not fit what it is to change."""


def plain(value: Any) -> Any:
    """Return a parsed configuration as dicts and lists, which can be changed and parsed again."""
    if hasattr(value, "as_dict"):  # jsonargparse.Namespace
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def set_argument(arguments: dict[str, Any], name: str, value: Any) -> str | None:
    """Set an argument of a callback, or of the component in which the configuration has it.

    Args:
        arguments: The arguments of the callback; changed in place.
        name: Which one.
        value: Its new value.

    Returns:
        A sentence if more was replaced than the name says, otherwise None.

    Example:
        >>> arguments = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}
        >>> set_argument(arguments, "lr", 0.2)
        >>> arguments
        {'optimizer': {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.2}}}
    """
    component = arguments.get(OF_COMPONENT.get(name, ""))
    if is_spec(component) and arguments.get(name) is None:
        component.setdefault("init_args", {})[name] = value
        return None
    before, arguments[name] = arguments.get(name), value
    if not (is_spec(before) and before.get("init_args")) or is_spec(value):
        return None
    lost = dict(before["init_args"])
    if name == "schedule" and isinstance(value, str) and lost.get("warmup") and not arguments.get("warmup"):
        arguments["warmup"] = lost.pop("warmup")
    return f"{name}={value!r} replaces {before['class_path']} and its arguments." if lost else None


def set_path(arguments: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set an argument within an argument: ``schedule.final``, ``optimizers.generator.lr``, ``spikes.threshold``.

    Args:
        arguments: The arguments of a callback; changed in place.
        path: Two names at least. One that leads into a list is the name of an entry, or its number.
        value: The new value.

    Raises:
        ChangeError: There is nothing of that name.

    Example:
        >>> arguments = {"optimizer": "lion"}
        >>> set_path(arguments, ["optimizer", "betas"], [0.9, 0.99])
        >>> arguments
        {'optimizer': 'lion', 'optimizer_kwargs': {'betas': [0.9, 0.99]}}
    """
    name, *rest = path
    if not rest:
        set_argument(arguments, name, value)
        return
    present = arguments.get(name)
    if name in BY_NAME and (present is None or isinstance(present, str)):
        name = BY_NAME[name]
        present = arguments.get(name)
    elif name == "schedule" and isinstance(present, str):
        present = arguments[name] = _spec_of_schedule(present, arguments)
    elif name == "schedule" and present is None:
        raise ChangeError(
            f"there is no schedule whose {rest[0]!r} could be set. Name one, for instance schedule=cosine"
        )
    if isinstance(present, list):
        entry = _entry(present, name, rest[0])
        set_path(_arguments_of(entry), rest[1:], value)
    elif isinstance(present, dict):
        rest = rest[1:] if rest[0] == "init_args" and len(rest) > 1 else rest
        set_path(_arguments_of(present), rest, value)
    else:
        new: dict[str, Any] = {}
        set_path(new, rest, value)
        arguments[name] = new


def is_spec(value: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether ``value`` is a mapping with ``class_path``."""
    return isinstance(value, dict) and "class_path" in value


def _arguments_of(value: dict[str, Any]) -> dict[str, Any]:
    if not is_spec(value):
        return value
    if value.get("init_args") is None:
        value["init_args"] = {}
    arguments: dict[str, Any] = value["init_args"]
    return arguments


def _entry(entries: list[Any], name: str, which: str) -> dict[str, Any]:
    """The entry of a list that has the name or number ``which``."""
    named = {_arguments_of(each).get("name"): each for each in entries if isinstance(each, dict)}
    named |= {str(index): each for index, each in enumerate(entries) if isinstance(each, dict)}
    if which not in named:
        raise ChangeError(f"{name} has no entry {which!r}. {nearest(which, [str(n) for n in named if n is not None])}")
    entry: dict[str, Any] = named[which]
    return entry


def _spec_of_schedule(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A schedule given by name as one with arguments, the warmup among them."""
    from lightning_optim.schedules import get_schedule

    cls = get_schedule(name)
    warmup = arguments.pop("warmup", None)
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {} if warmup is None else {"warmup": warmup},
    }
