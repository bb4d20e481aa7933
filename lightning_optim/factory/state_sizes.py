"""Size of the state that an optimizer will keep of a parameter, from shapes alone: no optimizer is made or stepped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.state import state_bytes

_Counts = tuple[int, int]
"""Numbers in the dtype of the parameter, and step counts and the like."""


def state_size(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> int | None:
    """Return the bytes of state that ``optimizer`` keeps of ``param``, or will keep.

    A user's optimizer may draw random numbers, count its instances or need what it gets later, so none is constructed
    or stepped to find out. Known are the optimizers of `lightning_optim.optim`, those of `torch.optim` in the table
    below, and whatever already has state.

    Args:
        optimizer: The optimizer; it is not changed.
        group: One of its groups.
        param: A parameter of that group; only its shape and dtype are read.

    Returns:
        Bytes; None if the optimizer is of another package, or subclasses torch's, and has not stepped.
    """
    if isinstance(param, UninitializedParameter):  # It gets its shape from the first batch.
        return None
    if present := optimizer.state.get(param):
        return sum(value.numel() * value.element_size() for value in present.values() if isinstance(value, Tensor))
    if isinstance(optimizer, FusedOptimizer):
        return state_bytes(param, dict(group), optimizer.rule_of(group))
    count = _TORCHS.get(type(optimizer))
    if count is None:
        return None
    numbers, counts = count(group, param.shape)
    of_count = 8 if torch.get_default_dtype() == torch.float64 else 4
    return numbers * param.element_size() + counts * of_count


def bytes_per_parameter(cls: type[FusedOptimizer], state_bits: int = 32, **settings: Any) -> float | None:
    """Return the bytes of state that an optimizer of this package makes for each value of a large float32 matrix.

    The state is made, without memory. If there is none with the default settings, momentum is switched on.

    Args:
        cls: The optimizer.
        state_bits: 32, 16 or 8.
        **settings: Further arguments of its constructor.

    Returns:
        Bytes, without step counts; None if none of its state can have so few bits.

    Example:
        >>> from lightning_optim.optim import AdamW
        >>> [bytes_per_parameter(AdamW, bits) for bits in (32, 16, 8)]
        [8.0, 4.0, 2.03125]
    """
    if "momentum" in cls.hyperparameters() and cls.rule(cls.hyperparameters() | settings).state == ():
        settings = {"momentum": 0.9} | settings
    matrix = torch.nn.Parameter(torch.empty(1024, 1024, dtype=torch.float32, device="meta"))
    make: Any = cls
    try:
        optimizer = make([matrix], state_bits=state_bits, **settings)
    except ValueError:
        return None
    optimizer.make_state([matrix])
    state = optimizer.state[matrix].values()
    return float(sum(value.numel() * value.element_size() for value in state if value.dim()) / matrix.numel())


def _times(arrays: int, counts: int = 1, **options: int) -> Callable[[Mapping[str, Any], torch.Size], _Counts]:
    """So many arrays of the parameter's shape, and more for each option that is switched on."""

    def count(group: Mapping[str, Any], shape: torch.Size) -> _Counts:
        more = sum(extra for option, extra in options.items() if group.get(option))
        return (arrays + more) * math.prod(shape), counts

    return count


def _factored(group: Mapping[str, Any], shape: torch.Size) -> _Counts:
    if len(shape) < 2:
        return math.prod(shape), 1
    rows, columns = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    return rows + columns, 1


_TORCHS: Mapping[type[Optimizer], Callable[[Mapping[str, Any], torch.Size], _Counts]] = MappingProxyType(
    {
        torch.optim.Adadelta: _times(2),
        torch.optim.Adafactor: _factored,
        torch.optim.Adam: _times(2, amsgrad=1),
        torch.optim.AdamW: _times(2, amsgrad=1),
        torch.optim.Adamax: _times(2),
        torch.optim.NAdam: _times(2, counts=2),
        torch.optim.RAdam: _times(2),
        torch.optim.RMSprop: _times(1, momentum=1, centered=1),
        torch.optim.Rprop: _times(2),
        torch.optim.SGD: _times(0, counts=0, momentum=1),
    }
)
"""By exact class: a subclass may keep more. Adagrad has its state from the start."""
