"""Where CPython and torch keep what changes when a tensor changes, found by looking at objects whose state is known.

To ask each of thousands of tensors in Python whether it still has the same memory takes longer than the update of small
ones. A compiled loop can read the same words of memory in a few nanoseconds, if it knows where they are. Neither
project promises that, so nothing is assumed: every place is found, and every answer compared with the public one, when
this is first used. If anything is not as expected there is no layout, and tensors are asked in Python.
``tests/kernels/test_object_layout.py`` states what is relied on.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor, nn

_WORD = 8
_IMPL_WORDS = (22, 23)
"""Number of words of a tensor's object in C++ that are looked at: as many as it has in torch 2.13, else in 2.11."""
_INLINE = 5
"""Number of dimensions up to which sizes and strides are kept in that object."""
_DEVICE_MASK = 0xFF_FFFF_FFFF
"""Bits of the word with dtype and device; the others are flags that follow from sizes, or are not set at all."""


@dataclass(frozen=True)
class Layout:
    """Places in objects, in words of 8 bytes from their beginning.

    Args:
        impl: In a Python tensor, the pointer to its object in C++.
        storage: In that object, the pointer to its storage.
        autograd: The pointer to what autograd keeps.
        python: The pointer to the Python object, whose lowest bits are flags; 0 if there is none yet.
        sizes: The number of dimensions, followed by 5 sizes, 5 strides, the offset, the number of elements, dtype with
            device, and the dispatch keys, which also hold the layout and lazy negation.
        grad: In what autograd keeps, the pointer to the gradient's object.
        data: In a storage, the address of its memory.
        nbytes: In a storage, its size.
        no_grad: What takes the place of the pointer to a gradient where there is none.
        device_mask: Bits that count of the word with dtype and device.
        tag: In a dict, the word that changes with every change of the dict.
    """

    impl: int
    storage: int
    autograd: int
    python: int
    sizes: int
    grad: int
    data: int
    nbytes: int
    no_grad: int
    device_mask: int
    tag: int

    def words(self) -> tuple[int, ...]:
        """Return all places, in order."""
        return astuple(self)


KIND_WORDS = 2 * _INLINE + 5
"""Number of words from the number of dimensions to the dispatch keys."""


def words(address: int, count: int) -> list[int]:
    """Return ``count`` words from ``address``, as signed integers."""
    return list((ctypes.c_int64 * count).from_address(address))


@cache
def layout() -> Layout | None:
    """Return where things are, or None if that is not known for certain."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != _WORD or sys.byteorder != "little":
        return None
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    for impl_words in _IMPL_WORDS:
        try:
            return _found(impl_words)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue
    return None


def _found(impl_words: int) -> Layout:
    one = nn.Parameter(torch.empty(7, 11, device="cpu"))
    other = nn.Parameter(torch.empty(13, 17, dtype=torch.float64, device="cpu"))
    part = torch.empty(40, device="cpu")[3:20:2]
    frozen = torch.empty(3, 5, device="cpu")
    impl = _place(words(id(one), type(one).__basicsize__ // _WORD), one._cdata)
    inside = words(one._cdata, impl_words)
    storage = _place(inside, one.untyped_storage()._cdata)
    python = _place([word & ~7 for word in inside], id(one))
    sizes = _place(inside, 7) - 1
    _require(storage < sizes and storage < python < sizes <= impl_words - KIND_WORDS)

    autograd = storage + 1
    _require(words(frozen._cdata, impl_words)[autograd] == 0)  # as for any tensor without a gradient
    before = words(inside[autograd], 8)
    one.grad = torch.empty(7, 11, device="cpu")
    grad = _place(words(inside[autograd], 8), one.grad._cdata)
    no_grad = before[grad]
    for without in (other, part):
        _require(no_grad != 0 and words(words(without._cdata, impl_words)[autograd], 8)[grad] == no_grad)

    in_storage = words(one.untyped_storage()._cdata, 8)
    data = in_storage.index(one.untyped_storage().data_ptr())  # It may be there twice, as the owner of the memory.
    nbytes = _place(in_storage, one.untyped_storage().nbytes())

    places = (impl, storage, autograd, python, sizes, grad, data, nbytes, no_grad, _DEVICE_MASK, _tag())
    found = Layout(*places)
    for tensor in (one, other, part, frozen, one.grad, torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")):
        _require(words(id(tensor), impl + 1)[impl] == tensor._cdata)
        _require(kind_of(tensor, found) == _expected(tensor, found))
        at = words(tensor._cdata, impl_words)[storage]
        _require(at == tensor.untyped_storage()._cdata)
        _require(words(at, nbytes + 1)[nbytes] == tensor.untyped_storage().nbytes())
        _require(words(at, data + 1)[data] == tensor.untyped_storage().data_ptr())
    kinds = {kind_of(tensor, found)[-2] for tensor in (one, other, torch.empty(7, 11, device="meta"))}
    _require(len(kinds) == 3)  # different dtypes and devices
    _require(kind_of(torch._neg_view(frozen), found)[-1] != kind_of(frozen, found)[-1])
    listed = [one, other]
    _require(words(id(listed), 4)[2] == 2 and words(words(id(listed), 4)[3], 2) == [id(one), id(other)])
    return found


def kind_of(tensor: Tensor, found: Layout) -> tuple[int, ...]:
    """Return `KIND_WORDS` words that say what ``tensor`` is, apart from its memory: 0 where they have no meaning."""
    raw = words(tensor._cdata, found.sizes + KIND_WORDS)[found.sizes :]
    dims = raw[0]
    if dims > _INLINE:
        raise ValueError("Sizes and strides of more than 5 dimensions are not kept in the object.")
    rest = [0] * (_INLINE - dims)
    raw[1 : 1 + 2 * _INLINE] = [*raw[1 : 1 + dims], *rest, *raw[1 + _INLINE : 1 + _INLINE + dims], *rest]
    raw[-2] &= found.device_mask
    return tuple(raw)


def _expected(tensor: Tensor, found: Layout) -> tuple[int, ...]:
    """Return what `kind_of` must return, from torch's own functions where these exist."""
    rest = (0,) * (_INLINE - tensor.dim())
    (keys,) = (ctypes.c_int64(torch._C._dispatch_keys(tensor).raw_repr()).value,)
    shape, strides = tensor.shape, tensor.stride()
    device = kind_of(tensor, found)[-2]
    return (tensor.dim(), *shape, *rest, *strides, *rest, tensor.storage_offset(), tensor.numel(), device, keys)


def _tag() -> int:
    """Return the place in a dict that changes with each change; fail if there is none (Python 3.14)."""
    known: dict[str, object] = {"a": 1, "b": 2}
    size = sys.getsizeof({}) // _WORD - 2  # without the header of the garbage collector
    before = words(id(known), size)
    known["a"] = 3  # the number of entries does not change
    place = _place([old ^ new for old, new in zip(before, words(id(known), size), strict=True)], None)
    known.get("a")
    changes = [
        lambda: known.update(a=4),
        lambda: known.setdefault("c", 5),
        lambda: known.pop("c"),
        lambda: known.__delitem__("b"),
        lambda: known.__ior__({"a": 6}),
        known.popitem,
        lambda: known.update(d=7),
        known.clear,
    ]
    for change in changes:
        seen = words(id(known), size)[place]
        _require(words(id(known), size)[place] == seen)
        change()
        _require(words(id(known), size)[place] != seen)
    return place


def _require(is_so: bool) -> None:
    """Raise `ValueError` if something is not as known; unlike ``assert``, under ``python -O`` as well."""
    if not is_so:
        raise ValueError("Objects are not laid out as known.")


def _place(found: list[int], value: int | None) -> int:
    """Return the only index of ``value``, or of anything but 0 for None."""
    (place,) = (i for i, word in enumerate(found) if (word != 0 if value is None else word == value))
    return place
