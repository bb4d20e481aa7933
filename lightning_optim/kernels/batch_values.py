"""Tensors of a batch as a rule in torch operations sees them: widened, divided, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.averages import state_names
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.pieces import Index, pieces, take
from lightning_optim.kernels.quantization import dequantize
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.weight_decay import INITIAL

SMALL = 2**16
"""Largest number of elements of a tensor whose temporaries are not worth a loop."""

NAMED: dict[str, Callable[..., Any]] = {
    "sqrt": torch.sqrt,
    "absolute": torch.abs,
    "sign": torch.sign,
    "where": torch.where,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@cache
def rebound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` rebound to operations on torch tensors."""
    return rebind(function, NAMED)  # type: ignore[no-any-return]


def whole_numel(batch: Batch) -> Tensor:
    """Return the number of elements of each tensor over all its shards, [tensors], float64."""
    return upload([t.numel() for t in batch.full_params], batch.device, widest_dtype(batch.device))


def pieces_of(batch: Batch, tensor: Tensor) -> Iterable[Index]:
    """Return the pieces of a tensor of ``batch``; one for tensors that are more than memory, which may not be cut."""
    return pieces(tensor.shape, batch.device) if batch.plain else [()]


def rows_of(columns: dict[str, Tensor], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Return the scalars of each tensor as 0-d tensors of ``dtype``."""
    values = zip(*(column.to(dtype).unbind() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def widened(tensor: Tensor) -> Tensor:
    """Convert to the dtype of the arithmetic; integers (indices, counters of a tensor rule) are not converted."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def moment_of(batch: Batch, i: int, name: str) -> Tensor:
    """Return a state in the dtype of the arithmetic; 8-bit codes are dequantized."""
    state = batch.states[i]
    if name in batch.quantized:
        return dequantize(state[name], state[f"{name}_scale"], batch.rule.compressible[name])
    return widened(state[name])


def needs_no_scaling(columns: dict[str, Tensor]) -> list[bool]:
    """Return for each gradient, on the CPU, whether it is used unscaled, which saves a pass over memory."""
    factors, l2 = columns["inverse_divisor"].tolist(), columns["l2"].tolist()
    return [factor == 1 and weight == 0 for factor, weight in zip(factors, l2, strict=True)]


def is_usual(batch: Batch, columns: dict[str, Tensor], collect: bool) -> bool:
    """Return whether a step of a tensor rule, on the CPU, is an update, decay of form `shrink`, and nothing else."""
    more = collect or batch.cautious or batch.low_precision or batch.averages or not batch.plain
    return not more and batch.decay_form == "shrink" and not any(columns["l2"].tolist())


def states_of_tensor_rule(batch: Batch, i: int) -> dict[str, Tensor]:
    """Return the rule's own state of a tensor by name, in the dtype of the arithmetic where it is floating point."""
    others = {"kahan_comp", INITIAL, *(f"{name}_scale" for name in batch.quantized), *state_names(batch.averages)}
    return {name: moment_of(batch, i, name) for name in batch.states[i] if name not in others}


def grad_of(batch: Batch, i: int, scalars: dict[str, Tensor], index: Index = ()) -> Tensor:
    """Return a gradient, or a piece of it, as the rule sees it: divided, negated for `maximize`, with the L2 term."""
    grad, param = batch.grads[i], batch.params[i]
    if index:
        grad, param = grad[index], param[index]
    scaled = grad.to(batch.dtype) * scalars["inverse_divisor"]
    if scaled.numel() <= SMALL:
        return scaled.add_(scalars["l2"] * widened(param))
    for part in pieces_of(batch, param):
        take(scaled, part).add_(scalars["l2"] * widened(take(param, part)))
    return scaled
