"""An exact snapshot of Python objects: everything that can be reached from them and changed, put back in place."""

from __future__ import annotations

import array
import ctypes
import datetime
import enum
import functools
import pathlib
import re
import sys
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from lightning_optim.callbacks._packages import is_lightning
from lightning_optim.tuning.trials import kept
from lightning_optim.tuning.trials.marks import is_running, mark, name_of, parts_of

LARGE = 1 << 24
"""Bytes above which a tensor or an array of a dataset is not copied: datasets are read, not written."""

_ATOMS: tuple[type, ...] = (
    type(None),
    *(bool, int, float, complex, str, bytes, range, slice, type, types.ModuleType, types.BuiltinFunctionType),
    *(types.CodeType, types.FrameType, types.TracebackType, types.GetSetDescriptorType, type(Ellipsis), enum.Enum),
    *(re.Pattern, pathlib.PurePath, datetime.date, datetime.timedelta, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)

_LIBRARIES = sys.stdlib_module_names | {
    *("lightning_optim", "torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning"),
}
"""Packages whose classes have no attributes of their own that a trial would change."""

_OPAQUE = (
    # What runs or is open cannot be put back by its attributes; a trial leaves it alone.
    *("threading", "_thread", "multiprocessing", "concurrent", "subprocess", "socket", "asyncio", "io", "_io"),
    *("weakref", "_weakref", "logging", "importlib", "ctypes", "contextvars", "contextlib", "inspect"),
    # Compilers, and caches that only make things quick.
    *("numba", "llvmlite", "triton", "torch._C", "torch._ops", "torch._dynamo", "torch._inductor", "torch.fx"),
    *("torch.jit", "torch.distributed", "torch.library", "torch._library", "torch.profiler", "lightning_optim.kernels"),
    # Where things are shown.
    *("rich", "tqdm", "tensorboard", "torch.utils.tensorboard", "matplotlib", "bokeh", "lightning.pytorch.loggers"),
    *("lightning.fabric.loggers", "pytorch_lightning.loggers", "lightning.pytorch.profilers"),
    *("lightning.pytorch.trainer.connectors.signal_connector", "lightning_optim.divergence.snapshots", "pyarrow"),
)


class ObjectSnapshot:
    """The state of all that can be reached from some objects and changed in place.

    Followed are attributes, slots, attributes of the user's classes, containers, the variables that functions enclose,
    parameters, buffers, gradients, optimizer state, and random number generators; those that everyone shares are kept,
    too. Every object stays the one that it is: contents are put back, not copies of objects. Not followed are threads,
    processes, open files, loggers, compiled code and variables of Python modules. Tensors and arrays of more than 16 MB
    in a dataset are not copied; a tensor among them that has been written is reported by `put_back`, as are generators
    and iterators that have advanced and cannot be set back.

    Args:
        *roots: Where to begin: a Trainer, a module, loaders.
        leave: Objects that are not followed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.seen = []
        >>> before = layer.weight.detach().clone()
        >>> with ObjectSnapshot(layer):
        ...     layer.seen.append(1)
        ...     layer.weight.data.zero_()
        tensor([[0., 0.]])
        >>> layer.seen, torch.equal(layer.weight, before)
        ([], True)
    """

    def __init__(self, *roots: Any, leave: Iterable[Any] = ()) -> None:
        self._contents: list[kept.Restore] = []
        self._tensors: list[kept.Restore] = [kept.keep_globals()]
        self._unkept: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {id(each): each for each in leave}
        self._storages: dict[int, Any] = {}
        self._walk(roots)

    def put_back(self) -> None:
        """Put everything back; the snapshot stays good for another time."""
        with torch.no_grad():
            for restore in self._contents:
                restore()
            for restore in self._tensors:
                restore()
        changed = [name_of(thing) for thing, before in self._unkept if mark(thing) != before]
        if changed:
            warnings.warn(
                f"A trial has changed what cannot be put back: {', '.join(sorted(set(changed)))}. The run that "
                "follows may differ from one without the trial.",
                stacklevel=2,
            )

    def __enter__(self) -> ObjectSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()

    def _walk(self, roots: Iterable[Any]) -> None:
        # What belongs to a dataset comes last, so that a tensor that something else has, too, counts as that one's.
        waiting: deque[tuple[Any, bool]] = deque((root, False) for root in roots)
        data: deque[tuple[Any, bool]] = deque()
        while waiting or data:
            thing, in_data = waiting.pop() if waiting else data.pop()
            if isinstance(thing, _ATOMS) or id(thing) in self._seen:
                continue
            if not in_data and _is_data(thing):
                data.append((thing, True))
                continue
            self._seen[id(thing)] = thing
            queue = data if in_data else waiting
            queue.extend((child, in_data) for child in self._keep(thing, in_data))

    def _keep(self, thing: Any, in_data: bool) -> Iterator[Any]:
        """Remember one object, and yield what it refers to."""
        if isinstance(thing, Tensor):
            yield from self._keep_tensor(thing, in_data)
        elif isinstance(thing, dict):
            self._contents.append(kept.keep_dict(thing))
            yield from dict.keys(thing)
            yield from dict.values(thing)
        elif isinstance(thing, list):
            self._contents.append(kept.keep_list(thing))
            yield from list.__iter__(thing)
        elif isinstance(thing, set):
            self._contents.append(kept.keep_set(thing))
            yield from set.__iter__(thing)
        elif isinstance(thing, tuple | frozenset):
            yield from thing
        elif isinstance(thing, deque):
            self._contents.append(kept.keep_deque(thing))
            yield from thing
        elif isinstance(thing, np.ndarray):
            yield from self._keep_array(thing, in_data)
        elif isinstance(thing, bytearray | array.array | ctypes.Array):
            self._contents.append(kept.keep_bytes(thing))
        elif isinstance(thing, types.FunctionType):
            yield from (cell for cell in thing.__closure__ or ())
            yield from (thing.__defaults__, thing.__kwdefaults__)
        elif isinstance(thing, types.CellType):
            if (restore := kept.keep_cell(thing)) is not None:
                self._contents.append(restore)
                yield thing.cell_contents
        elif isinstance(thing, types.MethodType):
            yield from (thing.__self__, thing.__func__)
        elif isinstance(thing, functools.partial):
            yield from (thing.func, thing.args, thing.keywords)
        elif isinstance(thing, Iterator) and is_running(thing):
            yield from self._keep_iterator(thing)
            return
        elif (generator := kept.keep_random(thing)) is not None:
            self._tensors.append(generator)
        elif isinstance(thing, np.random.Generator):
            yield thing.bit_generator
        if not _is_opaque(thing):
            yield from self._keep_attributes(thing)
            yield from self._keep_classes(type(thing))

    def _keep_attributes(self, thing: Any) -> Iterator[Any]:
        attributes = getattr(thing, "__dict__", None)
        if isinstance(attributes, dict):
            yield attributes
        elif isinstance(thing, nn.Module):
            yield from thing.__dict__.values()
        if names := _slots(type(thing)):
            self._contents.append(kept.keep_slots(thing, names))
            for name in names:
                with suppress(AttributeError):
                    yield getattr(thing, name)

    def _keep_classes(self, cls: type) -> Iterator[Any]:
        """Remember the attributes of the user's classes: to ``losses = []`` in a class all of its objects write."""
        for base in cls.__mro__:
            if id(base) in self._seen:
                continue
            self._seen[id(base)] = base
            if base.__module__.split(".")[0] not in _LIBRARIES:
                self._contents.append(kept.keep_class(base))
                yield from (value for value in vars(base).values() if not isinstance(value, types.FunctionType))

    def _keep_iterator(self, thing: Iterator[Any]) -> Iterator[Any]:
        if (restore := kept.keep_iterator(thing)) is not None:
            self._contents.append(restore)
        self._unkept.append((thing, mark(thing)))
        yield from parts_of(thing)

    def _keep_tensor(self, tensor: Tensor, in_data: bool) -> Iterator[Any]:
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad
        if hasattr(tensor, "__tensor_flatten__"):  # A wrapper, as a DTensor: what it wraps has the numbers.
            if tensor.is_leaf:
                self._contents.append(kept.keep_gradient(tensor))
            yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            return
        if tensor.is_meta or is_lazy(tensor):
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse tensor, say
            if tensor.is_leaf:
                self._contents.append(kept.keep_gradient(tensor))
            self._tensors.append(kept.keep_copy(tensor))
            return
        self._contents.append(kept.keep_place(tensor))
        if storage._cdata in self._storages:
            return
        self._storages[storage._cdata] = storage
        if in_data and storage.nbytes() > LARGE:
            self._unkept.append((tensor, mark(tensor)))
        else:
            self._tensors.append(kept.keep_storage(storage))

    def _keep_array(self, found: np.ndarray[Any, Any], in_data: bool) -> Iterator[Any]:
        if found.dtype == object:
            yield from found.flat
        if found.flags.writeable and not (in_data and found.nbytes > LARGE) and not isinstance(found, np.memmap):
            self._tensors.append(kept.keep_array(found))


def _slots(cls: type) -> tuple[str, ...]:
    """Return the names of the slots of a class and its bases, written in Python."""
    found: list[str] = []
    for base in cls.__mro__:
        own = base.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(found)


def _is_data(thing: Any) -> bool:
    return isinstance(thing, Dataset | DataLoader) or is_lightning(thing, "LightningDataModule")


def _is_opaque(thing: Any) -> bool:
    if isinstance(thing, nn.Module):
        return False
    module = type(thing).__module__
    return module.startswith(_OPAQUE) and any(module == name or module.startswith(name + ".") for name in _OPAQUE)
