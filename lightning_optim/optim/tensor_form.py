"""Fast comparison of the metadata of tensors, by a private part of torch with a fallback.

torch's compiler checks class, device, dtype, layout, lazy negation, sizes and strides of its inputs at each call, in
one C++ call for all tensors. Comparing these attribute by attribute takes longer than the rest of a step in Python.
``tests/optim/test_admission.py`` states what is relied on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # Other versions of torch may not have it.
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
    """Metadata of strided tensors.

    Args:
        tensors: The tensors; no reference to them is kept.
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
        """Return whether each tensor has the metadata of the one at its index; may be False for repeated tensors."""
        if len(tensors) != self._count:
            return False
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        # The comparison stops at the first difference, before it reads strides, which sparse tensors do not have.
        return all(list(map(a, tensors)) == seen for a, seen in zip(_ATTRIBUTES, self._seen, strict=True))
