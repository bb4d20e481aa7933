"""Checks of the dtype, layout, uniqueness and sharding of parameters, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter

from lightning_optim import kernels
from lightning_optim.core.placements import is_partial, partial_refused
from lightning_optim.kernels.rules import TensorRule
from lightning_optim.optim import low_precision
from lightning_optim.optim.admission import Ruled


def check_params(optimizer: Ruled, group: Mapping[str, Any]) -> None:
    """Check every parameter of a group.

    Args:
        optimizer: The optimizer.
        group: The complete parameter group.

    Raises:
        ValueError: A parameter cannot be updated; the message names it and the requirement.
    """
    seen: set[int] = set()
    rule = optimizer.rule_of(group)
    for index, param in enumerate(group["params"]):
        is_lazy = isinstance(param, UninitializedParameter)  # It has its shape by the first step.
        if is_lazy and isinstance(rule, TensorRule):
            raise ValueError(
                f"{type(optimizer).__name__}: parameter {index} is one of a lazy layer and has no shape yet, which "
                f"{type(rule).__name__} needs. Run one batch through the model before its optimizer is made."
            )
        label = f"{type(optimizer).__name__}: {optimizer.label(group, index)}"
        if not param.is_floating_point():
            raise ValueError(
                f"{label} has dtype {param.dtype}, but must have a real floating-point dtype. Frozen integers belong "
                "in buffers; view complex parameters as real."
            )
        if param.layout is not torch.strided:
            raise ValueError(f"{label} has the layout {param.layout}, but must be torch.strided (dense).")
        if id(param) in seen:  # torch only warns; here two threads would update the same memory.
            raise ValueError(f"{label} is in the group twice, but each parameter must be given once.")
        seen.add(id(param))
        if is_lazy:
            continue
        low_precision.check_param(label, group, param)
        if is_partial(param):
            raise ValueError(partial_refused(label, param))
        reason = rule.why_not(param, group)
        if reason is not None:
            raise ValueError(f"{label}: {reason}")
        kernels.choose(optimizer.backend, param.device)
