"""Checks of whether tensors are plain memory, so that a kernel may run on an address and a number of elements.

All but `storage_bytes`, `all_usual` and `resolved` run when tensors are sorted into batches, not at each step. Private
parts of torch are used in `_adds_nothing`, `_kind` and `resolved`; ``tests/optim/test_admission.py`` states what is
relied on.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.placements import PLAIN
from lightning_optim.core.sizes import span

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""Dtypes that kernels load as real numbers."""

_LAYOUT, _NBYTES = map(operator.attrgetter, ("layout", "nbytes"))

DEVICES = ("cpu", "cuda")
"""Device types for which there are kernels, and whose tensors have meaningful addresses."""


def is_usual(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is plain, contiguous and fully backed by its storage: a fast test of the usual case."""
    try:
        return (
            type(tensor) in PLAIN
            and tensor.layout is torch.strided
            and tensor.device.type in DEVICES
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and tensor.data_ptr() != 0
            and tensor.untyped_storage().nbytes() >= tensor.nbytes + tensor.storage_offset() * tensor.element_size()
        )
    except RuntimeError:  # The tensor has no storage.
        return False


def all_usual(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are `is_usual`, of class Tensor and on one device, without a Python loop."""
    if set(map(type, tensors)) != {Tensor} or set(map(_LAYOUT, tensors)) != {torch.strided}:
        return False
    if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    before = map(operator.mul, map(Tensor.storage_offset, tensors), map(Tensor.element_size, tensors))
    needed = map(operator.add, before, map(_NBYTES, tensors))
    return all(map(operator.ge, storage_bytes(tensors), needed)) and all(map(Tensor.data_ptr, tensors))


def storage_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """Return the storage size of each tensor in bytes."""
    return list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))


def is_plain(tensor: Tensor) -> bool:
    """Return whether the values of ``tensor`` are those at its address, with its strides.

    This is false for subclasses that hold other tensors (such as quantized weights) or change the meaning of
    operations, for lazily negated or conjugated tensors, and on devices not in `DEVICES`. `why_unsafe` checks that the
    memory exists and is large enough.
    """
    return (
        tensor.device.type in DEVICES
        and tensor.layout is torch.strided
        and (type(tensor) in PLAIN or _adds_nothing(type(tensor)))
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _adds_nothing(kind: type[Tensor]) -> bool:
    """Return whether a subclass does not override the meaning of any operation."""
    functions = [getattr(one.__torch_function__, "__func__", one.__torch_function__) for one in (kind, *PLAIN)]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and functions[0] in functions[1:]


def why_unsafe(tensor: Tensor, *, written: bool) -> str | None:
    """Return the reason why neither kernels nor torch's operations may run on ``tensor``; None if they may.

    Args:
        tensor: Any tensor.
        written: Whether the tensor is to be written as well as read.

    Returns:
        The predicate of a sentence whose subject is the tensor, or None.
    """
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}, but must be torch.strided"
    kind = _kind(tensor)
    if kind is not None:
        return f"is {kind}, which has no values that a step could change"
    if tensor.device.type not in DEVICES or not (type(tensor) in PLAIN or _adds_nothing(type(tensor))):
        return None  # The operations of torch define what such a tensor means.
    if tensor.numel() == 0:
        return None
    try:
        storage = tensor.untyped_storage()
        tensor.data_ptr()
    except RuntimeError:
        return "has no memory of its own (it belongs to a transform such as torch.func)"
    needed = tensor.storage_offset() * tensor.element_size() + span(tensor)
    if storage.nbytes() < needed or storage.data_ptr() == 0:
        return (
            f"needs {needed} bytes of memory, and its storage has {storage.nbytes()}: it has been resized, as FSDP "
            "resizes weights that are not in use"
        )
    if written and overlaps_itself(tensor):
        return (
            f"has several elements at one address (shape {tuple(tensor.shape)}, strides {tensor.stride()}), as after "
            "`expand`; copy it with .clone()"
        )
    return None


def _kind(tensor: Tensor) -> str | None:
    """Return a description of a tensor class without values of its own; None for all other classes."""
    if type(tensor) in PLAIN:
        return "a functional tensor" if torch._is_functional_tensor(tensor) else None
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return (
        "a FakeTensor"
        if isinstance(tensor, FakeTensor)
        else "a FunctionalTensor"
        if isinstance(tensor, FunctionalTensor)
        else None
    )


def resolved(grad: Tensor) -> Tensor:
    """Materialise a lazily negated or lazily zero gradient; return any other gradient unchanged."""
    grad = grad.resolve_neg()
    return grad.clone() if grad._is_zerotensor() else grad


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real and imaginary parts, [..., 2], and a real tensor unchanged.

    The result is a view, unless ``tensor`` is lazily conjugated.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements have, or may have, the same address."""
    if tensor.is_contiguous():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < expected:
                return True
            expected = (size - 1) * stride + expected
    return False


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one range of memory without gaps, in any order."""
    if tensor.is_contiguous():
        return True
    sizes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in sizes:
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def shared(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> tuple[int, int] | None:
    """Find two tensors that overlap in memory, at least one of which is written.

    Args:
        written: Plain tensors of any shapes on one device, backed by memory.
        read: Tensors of the same kind, which may overlap each other.

    Returns:
        Indices of the two tensors in the concatenation of both lists; None if there is no overlap.
    """
    tensors = [*written, *read]
    starts = np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)
    ends = starts + np.array([span(tensor) for tensor in tensors], dtype=np.int64)
    order = np.lexsort((ends, starts))
    order = order[ends[order] > starts[order]]  # Empty tensors overlap nothing.
    last = np.maximum.accumulate(ends[order])
    touching = np.flatnonzero(last[:-1] > starts[order][1:])
    if not len(touching):
        return None
    # A run is a sequence of address ranges each of which overlaps an earlier one of the run.
    breaks = np.flatnonzero(np.concatenate([[True], last[:-1] <= starts[order][1:], [True]]))
    for first, end in itertools.pairwise(breaks):
        if end - first > 1:
            found = _shared_in_run(order[first:end].tolist(), tensors, len(written), starts, ends)
            if found is not None:
                return found
    return None


def _shared_in_run(
    run: list[int], tensors: Sequence[Tensor], count: int, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, int] | None:
    """Find an overlap as `shared` does, within one run of overlapping address ranges.

    Ranges may overlap without common elements, because gaps of one tensor may hold the elements of another.
    """
    if all(i >= count for i in run):
        return None
    dense = [i for i in run if is_dense(tensors[i])]
    reach: int | None = None  # index of the written dense tensor so far with the highest end address
    reach_read: int | None = None
    for i in dense:
        others = (reach, reach_read) if i < count else (reach,)
        for other in others:
            if other is not None and ends[other] > starts[i]:
                return (other, i) if other < i else (i, other)
        if i < count:
            reach = i if reach is None or ends[i] > ends[reach] else reach
        else:
            reach_read = i if reach_read is None or ends[i] > ends[reach_read] else reach_read
    if len(dense) == len(run):
        return None
    return _shared_elements(run, tensors, count, starts, ends)


def _shared_elements(
    run: list[int], tensors: Sequence[Tensor], count: int, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, int] | None:
    """Find an overlap as `shared` does, element by element: written tensors are marked in a map of the memory."""
    base = min(starts[i] for i in run)
    grain = int(np.gcd.reduce([tensors[i].element_size() for i in run] + [int(starts[i] - base) for i in run]))
    owner = np.full(int(max(ends[i] for i in run) - base) // grain, -1, dtype=np.int32)
    for i in sorted(run):  # The indices of written tensors come first.
        tensor = tensors[i]
        places = torch.arange(span(tensor) // tensor.element_size(), device="cpu")
        places = places.as_strided(tensor.shape, tensor.stride())
        width = tensor.element_size() // grain
        first = places.reshape(-1, 1).numpy() * width + int(starts[i] - base) // grain
        cells = (first + np.arange(width)).reshape(-1)
        taken = owner[cells]
        if (taken >= 0).any():
            return int(taken[taken >= 0][0]), i
        if i < count:
            owner[cells] = i
    return None
