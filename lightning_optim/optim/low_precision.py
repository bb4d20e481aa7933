"""The flags `kahan_sum`, `stochastic_rounding` and `state_bits`: what they allow, and the state they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.backends.rounding import first_key
from lightning_optim.rules import Rule

DEFAULTS = {"kahan_sum": False, "stochastic_rounding": False, "state_bits": 32}
"""In the defaults of every optimizer, whether its constructor names them or not, so groups may always set them."""

EXTRAS = ("kahan_comp", "rounding_key")
"""State that is not the rule's."""

HALF = (torch.bfloat16, torch.float16)


def check(owner: str, group: Mapping[str, Any], rule: Rule) -> None:
    """Raise ValueError if the flags of ``group`` contradict each other, or ``rule`` cannot honour them."""
    if group["kahan_sum"] and group["stochastic_rounding"]:
        raise ValueError(
            f"{owner}: kahan_sum=True and stochastic_rounding=True are two answers to the same loss; choose one. "
            "kahan_sum is the more exact, stochastic_rounding needs no memory."
        )


def check_param(label: str, group: Mapping[str, Any], param: Tensor) -> None:
    """Raise ValueError if ``param`` cannot be kept as the flags of ``group`` say."""
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(
            f"{label} is float16, whose small numbers lose their last bits one by one; stochastic_rounding=True is for "
            "bfloat16. Use kahan_sum=True, or bfloat16 parameters."
        )


def uses(group: Mapping[str, Any]) -> bool:
    """Whether any of the flags is set."""
    return bool(group["kahan_sum"] or group["stochastic_rounding"] or group["state_bits"] != 32)


def storage(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether ``param`` is compensated, and which of its arrays are rounded stochastically.

    Wider parameters than these are what the flags stand in for, so they have no effect there.
    """
    rounded = ("param",) if group["stochastic_rounding"] and param.dtype == torch.bfloat16 else ()
    return group["kahan_sum"] and param.dtype in HALF, rounded


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], position: int) -> int:
    """Add to ``state`` what the flags need and it does not have yet.

    Args:
        state: Of ``param``; written.
        param: The parameter.
        group: Its group.
        position: Its place among all parameters of the optimizer; makes its noise its own.

    Returns:
        How many entries of ``state`` are there for the flags.
    """
    extras = 0
    kahan, rounded = storage(group, param, state)
    if kahan:
        if "kahan_comp" not in state:
            state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        extras += 1
    if rounded:
        if "rounding_key" not in state:
            key = first_key(int(group.get("rounding_seed", 0)), position)
            state["rounding_key"] = torch.full((), key, dtype=torch.int64, device=param.device)
        extras += 1
    return extras
