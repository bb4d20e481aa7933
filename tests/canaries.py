"""Memory in which an access outside a tensor shows.

`Canaries` puts known values before, after and between the elements of a tensor: a write there is found by looking
afterwards. `GuardPages` puts the tensor flush against a page that may not be touched: a read there ends the process, so
this is for processes of their own.
"""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer

MARGIN = 8192
"""Canaries on either side, in elements: more than a kernel's chunk, so that one chunk too many is found, not fatal."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """What is stored, as integers, so that NaN equals itself and 0 is not -0."""
    tensor = tensor.detach()
    tensor = torch._neg_view(tensor) if tensor.is_neg() else tensor
    return tensor.view(_BITS[tensor.element_size()]) if tensor.dtype != torch.bool else tensor


@dataclass
class _Home:
    name: str
    cells: Tensor  # all elements of the storage, [elements]
    watched: Tensor  # which of them may not change, [elements], bool
    expected: Tensor


class Memory(ABC):
    """Hands out storages, and tells which of them were written where they must not be.

    Args:
        fill: What surrounds a tensor: `numbers`, ordinary ones, which every update would change; or `nan`, which would
            show in whatever is computed from them.
    """

    def __init__(self, fill: str = "numbers") -> None:
        self._fill = fill
        self._homes: list[_Home] = []

    @abstractmethod
    def _allocate(self, dtype: torch.dtype, span: int) -> tuple[Tensor, int]:
        """Cells of a fresh storage, and which of them is the first of ``span`` that the tensor may use."""

    def home(self, name: str, tensor: Tensor, *, read_only: bool = False) -> Tensor:
        """``tensor`` in a storage of its own: values, dtype, shape and strides stay.

        Args:
            name: What `check` calls it.
            tensor: Strided, with memory.
            read_only: Whether its own elements may not change either.
        """
        tensor = tensor.detach()
        places = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        cells, first = self._allocate(tensor.dtype, 1 + sum(places) if tensor.numel() else 0)
        self._surround(cells)
        shape, strides = tensor.shape, tensor.stride()
        own = torch.arange(len(cells)).as_strided(shape, strides, first).reshape(-1)
        cells[own] = tensor.resolve_neg().reshape(-1)
        watched = torch.ones(len(cells), dtype=torch.bool)
        if not read_only:
            watched[own] = False
        self._homes.append(_Home(name, cells, watched, bits(cells).clone()))
        return cells.as_strided(shape, strides, first)

    def check(self) -> None:
        """Raise AssertionError that names every tensor which was overrun."""
        overrun = []
        for home in self._homes:
            wrong = (bits(home.cells) != home.expected) & home.watched
            if wrong.any():
                places = wrong.nonzero().view(-1).tolist()
                overrun.append(f"{home.name} ({len(places)} elements of its surroundings, first at {places[0]})")
        assert not overrun, f"written outside of: {'; '.join(overrun)}"

    def _surround(self, cells: Tensor) -> None:
        steps = torch.arange(len(cells)) + 7 * len(self._homes)  # no two tensors alike: their average would not move
        if not cells.dtype.is_floating_point:
            cells.copy_((steps * 37 + 11) % (2 if cells.dtype == torch.bool else 251))
        elif self._fill == "nan":
            cells.fill_(torch.nan)
        else:  # near 1, where a step of any size shows in every dtype
            cells.copy_(1 + (steps % 64) / 64)


class Canaries(Memory):
    """Storages with `MARGIN` known elements on either side."""

    def _allocate(self, dtype: torch.dtype, span: int) -> tuple[Tensor, int]:
        return torch.empty(span + 2 * MARGIN, dtype=dtype), MARGIN


class GuardPages(Memory):
    """Storages whose last element, or first, borders on memory that may not be touched.

    Args:
        side: `right` or `left`: where the tensor lies in its pages.
        fill: See `Memory`.
    """

    def __init__(self, side: str, fill: str = "numbers") -> None:
        super().__init__(fill)
        self._side = side

    def _allocate(self, dtype: torch.dtype, span: int) -> tuple[Tensor, int]:
        size = mmap.PAGESIZE
        pages = max(1, -(-span * dtype.itemsize // size))
        region = mmap.mmap(-1, (pages + 2) * size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for page in (0, pages + 1):
            forbidden = 0  # PROT_NONE
            if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + page * size), size, forbidden):
                raise OSError(ctypes.get_errno(), "mprotect")
        cells = torch.frombuffer(region, dtype=torch.uint8, offset=size, count=pages * size).view(dtype)
        return cells, len(cells) - span if self._side == "right" else 0


@contextmanager
def temporaries_in(memory: Memory) -> Iterator[None]:
    """Give what is copied for a kernel, or made for its results, a home in ``memory``, too."""
    contiguous, new_empty, empty_like = Tensor.contiguous, Tensor.new_empty, torch.empty_like

    def housed(tensor: Tensor) -> Tensor:
        return memory.home("a temporary", tensor) if has_memory(tensor) else tensor

    def copied(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = contiguous(self, *args, **kwargs)
        return self if result is self else housed(result)

    with (
        patch.object(Tensor, "contiguous", copied),
        patch.object(Tensor, "new_empty", lambda self, *a, **k: housed(new_empty(self, *a, **k))),
        patch.object(torch, "empty_like", lambda *a, **k: housed(empty_like(*a, **k))),
    ):
        yield


def has_memory(value: Any) -> bool:
    """Whether ``value`` is a plain tensor whose elements can be read."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    spanned = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    needed = (value.storage_offset() + spanned) * value.element_size() if value.numel() else 0
    return value.untyped_storage().nbytes() >= needed


def move_into(memory: Memory, optimizer: Optimizer) -> None:
    """Give every tensor that a step of ``optimizer`` touches a home in ``memory``.

    Parameters stay the objects they are. Gradients may then not change at all. What is no plain tensor stays where it
    is.
    """
    position = 0
    for number, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            name = group["param_names"][index] if "param_names" in group else f"parameter {position}"
            position += 1
            grad = param.grad
            if grad is not None and has_memory(grad) and not grad.is_neg():
                param.grad = None
                grad = memory.home(f"gradient of {name}", grad, read_only=True)
            if has_memory(param):
                param.data = memory.home(name, param.data)
            if grad is not None and grad.shape == param.shape and grad.dtype == param.dtype:
                param.grad = grad
            state = optimizer.state.get(param, {})
            for key, value in state.items():
                if has_memory(value):
                    state[key] = memory.home(f"state {key!r} of {name}", value)
        for key, value in group.items():
            if has_memory(value):
                group[key] = memory.home(f"{key!r} of group {number}", value)
