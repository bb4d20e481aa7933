"""Tells fast whether tensors have the form that others had: a private part of torch, and what stands in for it.

torch's compiler asks the same of its inputs at each call, in one call of C++ for all of them, of class, device, dtype,
layout, lazy negation, sizes and strides. Attribute by attribute it takes longer than all else that a step does in
Python. ``tests/optim/test_admission.py`` says what is relied on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch that has moved it
    TensorGuards = None  # type: ignore[assignment,misc]

_LAYOUT, _DTYPE, _DEVICE, _SHAPE = map(operator.attrgetter, ("layout", "dtype", "device", "shape"))
_ATTRIBUTES: tuple[Callable[[Tensor], Any], ...] = (
    type,
    _LAYOUT,
    _DTYPE,
    _DEVICE,
    _SHAPE,
    Tensor.stride,
    Tensor.is_neg,
    Tensor.is_inference,
)


class Form:
    """The form of some strided tensors.

    Args:
        tensors: Whose; they are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        if TensorGuards is None:
            self._guards: Any = None
            self._seen = [list(map(attribute, tensors)) for attribute in _ATTRIBUTES]
        else:
            sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
            strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` have it, each that of the one in its place. In doubt not: if one is there twice, say."""
        if len(tensors) != self._count:
            return False
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        # A sparse tensor has no strides: the first attribute that differs ends the search.
        return all(list(map(a, tensors)) == seen for a, seen in zip(_ATTRIBUTES, self._seen, strict=True))
