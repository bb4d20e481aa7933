"""What is remembered of one object each, and how it is put back in place."""

from __future__ import annotations

import collections
import ctypes
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Restore = Callable[[], object]
"""Puts one object back."""


def keep_dict(present: dict[Any, Any]) -> Restore:
    """Remember the keys, their order and the values of a dict of any class; the values are the same objects."""
    kind: Any = collections.OrderedDict if isinstance(present, collections.OrderedDict) else dict
    items = list(kind.items(present))

    def restore() -> None:
        now = list(kind.items(present))
        if len(now) == len(items) and all(a is c and b is d for (a, b), (c, d) in zip(now, items, strict=True)):
            return  # Nothing has changed, so that what watches writes to the dict sees none.
        kind.clear(present)
        for key, value in items:
            kind.__setitem__(present, key, value)

    return restore


def keep_list(present: list[Any]) -> Restore:
    """Remember the items of a list of any class."""
    items = list.copy(present)

    def restore() -> None:
        if len(present) != len(items) or any(a is not b for a, b in zip(present, items, strict=True)):
            list.__setitem__(present, slice(None), items)

    return restore


def keep_set(present: set[Any]) -> Restore:
    """Remember the members of a set."""
    members = set.copy(present)

    def restore() -> None:
        set.clear(present)
        set.update(present, members)

    return restore


def keep_deque(present: collections.deque[Any]) -> Restore:
    """Remember the items of a deque, the length of which stays bounded as it is."""
    items = list(present)

    def restore() -> None:
        present.clear()
        present.extend(items)

    return restore


def keep_bytes(present: Any) -> Restore:
    """Remember the bytes of a bytearray, of an array of the standard library or of ctypes."""
    view = memoryview(present).cast("B") if isinstance(present, ctypes.Array) else present
    saved = view[:].tobytes() if isinstance(view, memoryview) else view[:]

    def restore() -> None:
        view[:] = saved

    return restore


def keep_slots(present: Any, names: tuple[str, ...]) -> Restore:
    """Remember the attributes of an object that are in slots."""
    missing = object()
    values = [getattr(present, name, missing) for name in names]

    def restore() -> None:
        for name, value in zip(names, values, strict=True):
            now = getattr(present, name, missing)
            if now is value:
                continue
            if value is missing:
                object.__delattr__(present, name)
            else:
                object.__setattr__(present, name, value)

    return restore


def keep_class(present: type) -> Restore:
    """Remember the attributes of a class; the values are the same objects."""
    missing = object()
    saved = {name: value for name, value in vars(present).items() if not name.startswith("__")}

    def restore() -> None:
        for name in [name for name in vars(present) if not name.startswith("__") and name not in saved]:
            type.__delattr__(present, name)
        for name, value in saved.items():
            if vars(present).get(name, missing) is not value:
                type.__setattr__(present, name, value)

    return restore


def keep_cell(present: types.CellType) -> Restore | None:
    """Remember the variable of an enclosing function; None if it has no value."""
    try:
        value = present.cell_contents
    except ValueError:
        return None

    def restore() -> None:
        present.cell_contents = value

    return restore


def keep_array(present: np.ndarray[Any, Any]) -> Restore:
    """Remember the elements of an array of numpy."""
    saved = present.copy()

    def restore() -> None:
        present[...] = saved

    return restore


def keep_random(present: Any) -> Restore | None:
    """Remember the state of a random number generator of Python, numpy or torch; None if it is something else."""
    if isinstance(present, torch.Generator):
        state = present.get_state()
        return lambda: present.set_state(state)
    if isinstance(present, random.Random):
        if type(present) is random.SystemRandom:
            return None
        own = present.getstate()
        return lambda: present.setstate(own)
    if isinstance(present, np.random.RandomState):
        legacy = present.get_state()
        return lambda: present.set_state(legacy)
    if isinstance(present, np.random.BitGenerator):
        bits = present.state
        return lambda: setattr(present, "state", bits)
    return None


def keep_iterator(present: Any) -> Restore | None:
    """Remember the place of an iterator over a list, a tuple or a range; None if it has ended, or has no such place."""
    if not hasattr(present, "__setstate__") or type(present).__module__ != "builtins":
        return None
    reduced = present.__reduce__()
    if len(reduced) < 3:
        return None
    place = reduced[2]
    return lambda: present.__setstate__(place)


def keep_storage(storage: torch.UntypedStorage) -> Restore:
    """Remember the bytes of a tensor's storage; those of an accelerator in the memory of the host."""
    size = storage.nbytes()
    saved = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
    saved.copy_(storage)

    def restore() -> None:
        if storage.nbytes() != size:
            storage.resize_(size)
        storage.copy_(saved)

    return restore


def keep_place(tensor: Tensor) -> Restore:
    """Remember which storage a tensor lies in and how, whether it requires a gradient, and its gradient's place."""
    alias, restore_gradient = tensor.detach(), keep_gradient(tensor) if tensor.is_leaf else None

    def restore() -> None:
        if not _lies_the_same(tensor, alias):
            tensor.data = alias
        if restore_gradient is not None and tensor.is_leaf:
            restore_gradient()

    return restore


def keep_gradient(tensor: Tensor) -> Restore:
    """Remember which gradient a leaf has, and whether it requires one."""
    grad, requires_grad = tensor.grad, tensor.requires_grad

    def restore() -> None:
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.grad is not grad:
            tensor.grad = grad

    return restore


def keep_copy(tensor: Tensor) -> Restore:
    """Remember a tensor without a storage of its own, as a sparse one."""
    saved = tensor.detach().clone()

    def restore() -> None:
        tensor.data = saved.clone()

    return restore


def keep_globals() -> Restore:
    """Remember the random number generators of Python, numpy and torch that everyone shares."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return restore


def _lies_the_same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )
