"""Checks of the types of arguments by their annotations, at construction, and conversion of what YAML would take.

A class decorated with `typed` refuses an argument that does not fit its annotation, with the argument's name, what was
given and what is needed. It takes what a YAML file would give for it: a mapping of arguments in place of an object
(``spikes={"threshold": 8}``), ``{"class_path": ..., "init_args": ...}``, and, where there is an object or None, True
for the object with its defaults and False for None. Ranges, NaN included, are the class's own to check.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, overload

from lightning_optim.core.imports import import_object
from lightning_optim.core.suggest import nearest

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxdict = _short.maxlist = 8


class InvalidArgumentError(TypeError, ValueError):
    """An argument does not fit its annotation. It is a ValueError as well, like the errors about its value."""


class _UnfitError(Exception):
    """A value does not fit an annotation."""


@overload
def typed(cls: C, *, own: Collection[str] = ()) -> C: ...
@overload
def typed(cls: None = None, *, own: Collection[str] = ()) -> Callable[[C], C]: ...
def typed(cls: Any = None, *, own: Collection[str] = ()) -> Any:
    """Make the constructor of a class check its arguments by their annotations; a class decorator.

    Args:
        cls: The class.
        own: Names of arguments that the class checks itself, because it knows more to say about them.

    Returns:
        The class; a decorator if ``cls`` is None.

    Example:
        >>> @typed
        ... class Point:
        ...     def __init__(self, x: float, y: float | None = None) -> None:
        ...         self.x = x
        >>> Point("1.0")
        Traceback (most recent call last):
        lightning_optim.core.typed.InvalidArgumentError: Invalid x='1.0' of Point: must be a number (without quotes).
    """
    if cls is None:
        return lambda decorated: typed(decorated, own=own)
    cls.__init__ = checked(vars(cls)["__init__"], own=own)
    return cls


@overload
def checked(function: F, *, own: Collection[str] = ()) -> F: ...
@overload
def checked(function: None = None, *, own: Collection[str] = ()) -> Callable[[F], F]: ...
def checked(function: Any = None, *, own: Collection[str] = ()) -> Any:
    """Make a function or method check its arguments by their annotations; a decorator.

    Args:
        function: The function. A parameter called ``self`` is not checked.
        own: Names of arguments that it checks itself.

    Returns:
        The function; a decorator if ``function`` is None.
    """
    if function is None:
        return lambda decorated: checked(decorated, own=own)
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]

    @functools.cache
    def hints() -> dict[str, Any]:  # not before the first call: what is annotated may not be loaded yet
        found = typing.get_type_hints(function)
        return {name: found[name] for name in names if name in found and name not in own}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := [name for name in kwargs if name not in names]:
            text = f"{_owner(function, args)} got an unexpected keyword argument {unknown[0]!r}."
            raise TypeError(f"{text} {nearest(unknown[0], names)}")
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_owner(function, args)}: {error}.") from None
        for name, hint in hints().items():
            if name in given.arguments:
                named = given.arguments.get("name")
                owner = f"{_owner(function, args)}{f' {named!r}' if isinstance(named, str) else ''}"
                default = signature.parameters[name].default
                given.arguments[name] = fit(given.arguments[name], hint, name, owner, default)
        return function(*given.args, **given.kwargs)

    return call


def _owner(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """Return the name of what arguments belong to: a class, or a function."""
    return type(args[0]).__name__ if function.__name__ == "__init__" else f"{function.__name__}()"


def fit(value: Any, hint: Any, name: str, owner: str, default: Any = inspect.Parameter.empty) -> Any:
    """Return ``value`` as it fits ``hint``, an annotation.

    Args:
        value: The argument.
        hint: The annotation.
        name: Name of the argument, for messages.
        owner: Name of its owner, for messages.
        default: Default of the argument, which always fits, and which True stands for if it is an object.

    Returns:
        ``value``, or what it stands for.

    Raises:
        InvalidArgumentError: It does not fit.
        ValueError: It is a mapping of arguments, or a duration, that is not valid.
        TypeError: It is a mapping with an unknown argument.
    """
    if value is default:
        return value
    try:
        return _fit_number(value, hint, default)
    except _UnfitError:
        needed, given = describe(hint), _short.repr(value)
        quotes = " (without quotes)" if _is_quoted_number(value, hint) else ""
        raise InvalidArgumentError(f"Invalid {name}={given} of {owner}: must be {needed}{quotes}.") from None
    except (ValueError, TypeError) as error:
        kind = type(error) if type(error) in (ValueError, TypeError) else ValueError
        raise kind(f"Invalid {name}={_short.repr(value)} of {owner}: {error}") from error


def _fit_number(value: Any, hint: Any, default: Any) -> Any:
    with contextlib.suppress(_UnfitError):
        return _fit(value, hint, default)
    # A number of numpy's or torch's stands for itself.
    is_number = getattr(value, "shape", None) == () and hasattr(value, "item")
    return _fit(value.item() if is_number else value, hint, default)


def _fit(value: Any, hint: Any, default: Any = None) -> Any:
    members = _members(hint)
    if {int, str} <= set(members) and isinstance(value, numbers.Real | str):
        from lightning_optim.core.durations import Duration  # which is itself typed

        Duration.parse(value)  # type: ignore[arg-type]  # its message says how to write one
        return value
    for member in members:  # as it is, before what it may stand for
        try:
            return _as_it_is(value, member)
        except _UnfitError:
            continue
    plain = [member for member in members if isinstance(member, type) and is_dataclass(member)]
    if isinstance(value, bool) and plain:
        if value:
            return default if isinstance(default, plain[0]) else plain[0]()
        if type(None) in members:
            return None
    if isinstance(value, Mapping):
        if "class_path" in value:
            return _made(value, tuple(m for m in members if isinstance(m, type) and m.__module__ != "builtins"))
        if plain:
            known = (cls for cls in plain if value.keys() <= inspect.signature(cls).parameters.keys())
            return next(known, plain[0])(**value)
    raise _UnfitError


def _as_it_is(value: Any, hint: Any) -> Any:
    """Return ``value`` if it is what one member of a union names; its parts may stand for something."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Any or isinstance(origin, TypeVar):
        return value
    if origin is typing.Literal:
        return _only_if(any(value is one or (type(value) is type(one) and value == one) for one in args), value)
    if origin in (int, float):
        kind = numbers.Integral if origin is int else numbers.Real
        _only_if(isinstance(value, kind) and not isinstance(value, bool), value)
        return value if isinstance(value, int | float) else origin(value)  # numpy's scalars
    if origin is Callable:
        return _only_if(callable(value), value)
    if origin is type:
        return _only_if(isinstance(value, type) and issubclass(value, args or object), value)
    if not isinstance(origin, type):
        raise TypeError(f"cannot check against the annotation {hint!r}")
    if issubclass(origin, Mapping):
        _only_if(isinstance(value, Mapping), value)
        key_hint, part_hint = args or (Any, Any)
        parts = [(_fit(key, key_hint), _fit(part, part_hint)) for key, part in value.items()]
        same = all(part is value[key] for key, part in parts)
        return value if same else dict(parts)
    if origin is tuple:
        _only_if(isinstance(value, list | tuple), value)
        hints = args[:1] * len(value) if args[-1:] == (...,) else args or (Any,) * len(value)
        _only_if(len(hints) == len(value), value)
        return tuple(_fit(part, of) for part, of in zip(value, hints, strict=True))
    if _is_list(origin):
        return _as_list(value, args[0] if args else Any, one_pass=origin is Iterable)
    return _only_if(isinstance(value, origin), value)


def _as_list(value: Any, hint: Any, one_pass: bool) -> Any:
    if one_pass and not isinstance(value, Collection):
        return _only_if(isinstance(value, Iterable), value)
    _only_if(isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping), value)
    parts = [_fit(part, hint) for part in value]
    return value if all(map(operator.is_, parts, value)) else parts


def _is_list(origin: type) -> bool:
    return origin in (list, set, frozenset, Sequence, Collection, Iterable)


def _only_if(fits: bool, value: Any) -> Any:
    if not fits:
        raise _UnfitError
    return value


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (hint,)


def _made(mapping: Mapping[str, Any], classes: tuple[type, ...]) -> Any:
    if not classes:
        raise _UnfitError
    if unknown := sorted(map(str, mapping.keys() - {"class_path", "init_args"})):
        raise ValueError(f"Unknown key {unknown[0]!r}: must be class_path or init_args.")
    cls = import_object(mapping["class_path"], "class", classes)
    if not (isinstance(cls, type) and issubclass(cls, classes)):
        raise ValueError(f"{mapping['class_path']} must be {' or '.join(map(_a, classes))}.")
    return cls(**(mapping.get("init_args") or {}))


def _is_quoted_number(value: Any, hint: Any) -> bool:
    try:
        return isinstance(value, str) and {int, float} & set(_members(hint)) != set() and math.isfinite(float(value))
    except ValueError:
        return False


_WORDS = {
    type(None): "None",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def describe(hint: Any) -> str:
    """Describe an annotation in words, to follow "must be".

    Example:
        >>> describe(float | None), describe(Sequence[str] | str)
        ('a number or None', 'a list (each: a text) or a text')
    """
    words = list(dict.fromkeys(_describe(member) for member in _members(hint)))
    if "None" in words:
        words = [word for word in words if word != "None"] + ["None"]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in _WORDS:
        return _WORDS[origin]
    if origin is Any:
        return "anything"
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin is Callable:
        return "a function"
    if origin is type:
        return "a class"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping" + (f" (values: {describe(args[1])})" if len(args) > 1 and args[1] is not Any else "")
    if origin is tuple and args and args[-1] is not ...:
        return f"{len(args)} values ({', '.join(map(describe, args))})"
    if (
        isinstance(origin, type)
        and issubclass(origin, Iterable)
        and origin.__module__ in ("collections.abc", "builtins")
    ):
        return "a list" + (f" (each: {describe(args[0])})" if args and args[0] is not Any else "")
    return _a(origin) + (" (or its arguments as a mapping)" if is_dataclass(origin) else "")


def _a(cls: Any) -> str:
    name = getattr(cls, "__name__", str(cls))
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"
