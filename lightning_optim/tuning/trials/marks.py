"""Marks by which is seen that something has changed that cannot be put back: written data, and iterators."""

from __future__ import annotations

import gc
import itertools
import types
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_PLACES: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))
"""Iterators whose place is a number."""


_STATELESS: tuple[type, ...] = (zip, map, filter, itertools.starmap, itertools.filterfalse, itertools.compress)
"""Iterators that are where what they read from is; ``itertools.cycle`` would break if its list were put back."""


def is_running(thing: Iterator[Any]) -> bool:
    """Return whether an iterator is a generator, or one of Python's own, as of ``zip`` and ``itertools``."""
    return isinstance(thing, types.GeneratorType) or type(thing).__module__ in ("builtins", "itertools")


def parts_of(thing: Iterator[Any]) -> list[Any]:
    """Return what an iterator reads from, if that is all of its state; nothing for one that has a state of its own."""
    return gc.get_referents(thing) if isinstance(thing, _STATELESS) else []


def mark(thing: Any) -> Any:
    """Return what compares unequal once a tensor has been written, or an iterator has gone on."""
    if isinstance(thing, Tensor):
        return thing._version
    if isinstance(thing, types.GeneratorType):
        if thing.gi_frame is None:
            return None
        names = [(name, id(value)) for name, value in thing.gi_frame.f_locals.items()]
        return thing.gi_frame.f_lasti, names, mark(thing.gi_yieldfrom)
    return _state(thing) if isinstance(thing, Iterator) and is_running(thing) else None


def name_of(thing: Any) -> str:
    """Return what to call it."""
    if isinstance(thing, Tensor):
        return f"a tensor of a dataset, of shape {list(thing.shape)}"
    if isinstance(thing, types.GeneratorType):
        return f"the generator {thing.__qualname__}"
    return f"an iterator of class {type(thing).__name__}"


def _state(thing: Any) -> Any:
    """What an iterator says of its state for copies, with the identities of objects in place of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.14 has no copies of itertools; before, it warns.
            return _flat(thing.__reduce__())
    except Exception:  # It cannot be copied, or what it reads from has changed.
        return None


def _flat(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_flat, value))
    if isinstance(value, _PLACES):
        return _flat(value.__reduce__())
    return value if isinstance(value, int | str) else id(value)
