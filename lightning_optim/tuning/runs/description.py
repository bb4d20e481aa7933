"""Descriptions of arguments that are the same in every process, by which a job is recognised."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DEEPEST = 12
_PLAIN = (bool, int, float, str, tuple, type(None))


def digest(value: Any) -> str:
    """Return a digest of data for JSON.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def describe(value: Any, depth: int = 0) -> Any:
    """Return data for JSON that differ where two values differ: of functions the source, of tensors a digest.

    Args:
        value: Any value.
        depth: How deep inside another value it is.

    Example:
        >>> describe({"lr": 0.1, "betas": (0.9, 0.95)})
        {'lr': 0.1, 'betas': [0.9, 0.95]}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    if depth > _DEEPEST:
        return _name(type(value))
    if isinstance(value, Mapping):
        return {str(key): describe(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [describe(each, depth + 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((describe(each, depth + 1) for each in value), key=repr)
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
        return {"partial": [describe(part, depth + 1) for part in parts]}
    if inspect.isbuiltin(value):
        return _name(value)
    if isinstance(value, type):
        return {"class": _name(value), "source": _source_of(value)}
    if inspect.isfunction(value):
        return _of_function(value, depth)
    if inspect.ismethod(value):
        return {"method": value.__name__, "of": describe(value.__self__, depth + 1)}
    return _of_object(value, depth)


def _of_function(function: Any, depth: int) -> Any:
    try:
        caught = inspect.getclosurevars(function).nonlocals
    except (TypeError, ValueError):
        caught = {}
    return {
        "function": function.__qualname__,
        "source": _source_of(function) or digest(function.__code__.co_code.hex() + repr(function.__code__.co_consts)),
        "defaults": describe([function.__defaults__, function.__kwdefaults__], depth + 1),
        "closure": describe(caught, depth + 1),
    }


def _source_of(thing: Any) -> str:
    """Return a digest of the source of a function or class; empty where it is not known."""
    try:
        return digest(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError):
        return ""


def _of_object(value: Any, depth: int) -> Any:
    import numpy
    import torch

    if isinstance(value, torch.Tensor):
        from lightning_optim.tuning.runs.digests import digest_of_tensors

        return {"tensor": digest_of_tensors([value])}
    if isinstance(value, torch.nn.Module):
        from lightning_optim.tuning.runs.digests import digest_of_module

        return {"module": _name(type(value)), "weights": digest_of_module(value), "settings": _settings_of(value)}
    found: dict[str, Any] = {"object": _name(type(value))}
    if hasattr(value, "__array__"):  # of numpy, pandas and their like
        array = numpy.asarray(value)
        numbers = array.tolist() if array.dtype.hasobject else array.tobytes()
        return {**found, "array": [str(array.dtype), list(array.shape), describe(numbers, depth + 1)]}
    state = getattr(value, "__dict__", None)
    if state:
        found["state"] = {k: describe(v, depth + 1) for k, v in sorted(state.items()) if not k.startswith("__")}
    elif (text := repr(value)) and " at 0x" not in text:  # A dtype, a range or a date has no state but its text.
        found["text"] = text
    return found


def _settings_of(module: Any) -> dict[str, Any]:
    """Return the numbers and texts among the attributes of a module and its parts: a rate of dropout, an exponent."""
    return {
        name: {
            "class": describe(type(each)),
            **{k: describe(v) for k, v in vars(each).items() if isinstance(v, _PLAIN)},
        }
        for name, each in module.named_modules()
    }


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"
