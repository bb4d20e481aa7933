"""Which tensors are plain memory: what a kernel, which gets an address and a number of elements, may be given.

All but `all_usual` and `resolved` is asked when tensors are sorted, not at each step. Private parts of
torch are touched in `_adds_nothing`, `_kind` and `resolved`; ``tests/optim/test_admission.py`` says what is relied on.
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
"""What kernels load as real numbers."""

_LAYOUT, _NBYTES = map(operator.attrgetter, ("layout", "nbytes"))

DEVICES = ("cpu", "cuda")
"""Types of devices for which there are kernels, and on which addresses mean something."""


def is_usual(tensor: Tensor) -> bool:
    """Whether ``tensor`` is plain, contiguous and in memory that is there: what nearly all are, told fast."""
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
    except RuntimeError:  # no memory
        return False


def all_usual(tensors: Sequence[Tensor]) -> bool:
    """Whether all are, and of class Tensor and on one device, asked without a loop in Python."""
    if set(map(type, tensors)) != {Tensor} or set(map(_LAYOUT, tensors)) != {torch.strided}:
        return False
    if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    before = map(operator.mul, map(Tensor.storage_offset, tensors), map(Tensor.element_size, tensors))
    needed = map(operator.add, before, map(_NBYTES, tensors))
    there = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    return all(map(operator.ge, there, needed)) and all(map(Tensor.data_ptr, tensors))


def is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` are what lies at its address, with its strides.

    Not so of classes that hold other tensors (quantized weights, say) or change what operations mean, of lazily negated
    or conjugated tensors, and off the `DEVICES`. That the memory is there, and large enough, `why_unsafe` says.
    """
    return (
        tensor.device.type in DEVICES
        and tensor.layout is torch.strided
        and (type(tensor) in PLAIN or _adds_nothing(type(tensor)))
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _adds_nothing(kind: type[Tensor]) -> bool:
    """Whether a subclass leaves the meaning of all operations to torch."""
    functions = [getattr(one.__torch_function__, "__func__", one.__torch_function__) for one in (kind, *PLAIN)]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and functions[0] in functions[1:]


def why_unsafe(tensor: Tensor, *, written: bool) -> str | None:
    """Why nothing, neither a kernel nor torch's operations, may run on ``tensor``, as words after its name; or None.

    Args:
        tensor: Any.
        written: Whether it is to be written, and not only read.
    """
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; needed is torch.strided"
    kind = _kind(tensor)
    if kind is not None:
        return f"is {kind}, which has no numbers that a step could change"
    if tensor.device.type not in DEVICES or not (type(tensor) in PLAIN or _adds_nothing(type(tensor))):
        return None  # torch's operations know what to do
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
            "does with weights that are not in use"
        )
    if written and overlaps_itself(tensor):
        return (
            f"has several elements in one place (shape {tuple(tensor.shape)}, strides {tensor.stride()}), as "
            "`expand` makes them; make a copy of it with .clone()"
        )
    return None


def _kind(tensor: Tensor) -> str | None:
    """What ``tensor`` only pretends to be numbers as."""
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
    """A gradient with its lazy negation, or torch's lazy zeros, put into memory; else itself."""
    grad = grad.resolve_neg()
    return grad.clone() if grad._is_zerotensor() else grad


def as_real(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor as numbers of their own, [..., 2]; a real tensor as it is.

    A view, unless ``tensor`` is lazily conjugated.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements are, or might be, one place in memory."""
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
    """Whether the elements fill one run of memory, in whatever order."""
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
    """Two tensors that have an element in common, of which one at least is written; None if there are none.

    Args:
        written: Plain tensors of one device, in memory that is there.
        read: The same, which may have elements in common with each other.

    Returns:
        Their places in the two lists one after the other.
    """
    tensors = [*written, *read]
    starts = np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)
    ends = starts + np.array([span(tensor) for tensor in tensors], dtype=np.int64)
    order = np.lexsort((ends, starts))
    order = order[ends[order] > starts[order]]  # without the empty ones
    last = np.maximum.accumulate(ends[order])
    touching = np.flatnonzero(last[:-1] > starts[order][1:])
    if not len(touching):
        return None
    # Runs of intervals of which each reaches into the memory of one before it.
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
    """As `shared`, of tensors whose memory lies intertwined. Gaps of one may hold the elements of another."""
    if all(i >= count for i in run):
        return None
    dense = [i for i in run if is_dense(tensors[i])]
    reach: int | None = None  # of the tensors so far that fill their memory, one that is written and ends last
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
    """As `shared`, element by element: the written ones are painted into a map of the memory."""
    base = min(starts[i] for i in run)
    grain = int(np.gcd.reduce([tensors[i].element_size() for i in run] + [int(starts[i] - base) for i in run]))
    owner = np.full(int(max(ends[i] for i in run) - base) // grain, -1, dtype=np.int32)
    for i in sorted(run):  # written ones first
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
