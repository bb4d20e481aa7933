"""The options `kahan_sum`, `stochastic_rounding` and `state_bits`: when they are valid, and the state they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels import quantization
from lightning_optim.kernels.rounding import first_key
from lightning_optim.kernels.rules import Rule, UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL

FLAGS = ("kahan_sum", "stochastic_rounding", "state_bits")
"""The shared options that this module is about."""

HALF = (torch.bfloat16, torch.float16)
SMALL = 4096
"""Below this many elements state stays in 32 bits with `state_bits=8`: there is nothing to gain, and small tensors
(norms, biases) are the sensitive ones. As in the paper on 8-bit optimizers."""


def check(owner: str, group: Mapping[str, Any], rule: Rule) -> None:
    """Check that the flags of ``group`` agree with each other and with ``rule``.

    Args:
        owner: The optimizer's name, for the message.
        group: The parameter group, complete.
        rule: The rule that updates it.

    Raises:
        ValueError: They contradict each other, or ``rule`` cannot honour them.
    """
    if group["kahan_sum"] and group["stochastic_rounding"]:
        raise ValueError(
            f"{owner}: kahan_sum=True and stochastic_rounding=True are two answers to the same loss; choose one. "
            "kahan_sum is the more exact, stochastic_rounding needs no memory."
        )
    bits = group["state_bits"]
    if bits not in (32, 16, 8) or isinstance(bits, bool):
        raise ValueError(f"{owner}: state_bits={bits!r}; needed is 32, 16 or 8.")
    if bits == 32 or rule.compressible:
        return
    if isinstance(rule, UpdateRule) and not rule.state:
        reason = "it keeps no state with these settings"
    else:
        reason = "its state is more than moments that average (sums, weights, matrix factors), and needs 32 bits"
    raise ValueError(f"{owner}: state_bits={bits} cannot be used, because {reason}. Needed is state_bits=32.")


def check_param(label: str, group: Mapping[str, Any], param: Tensor) -> None:
    """Check that ``param``, of any shape, can be stored as the flags of ``group`` say.

    Raises:
        ValueError: Its dtype or its sharding does not allow it.
    """
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(
            f"{label} is float16, whose small numbers lose their last bits one by one; stochastic_rounding=True is for "
            "bfloat16. Use kahan_sum=True, or bfloat16 parameters."
        )
    if group["state_bits"] != 32 and param.dtype == torch.float64:
        raise ValueError(
            f"{label} is float64; state_bits={group['state_bits']} would throw its precision away. Needed is 32."
        )
    if group["state_bits"] == 8 and hasattr(param, "device_mesh"):
        raise ValueError(
            f"{label} is a DTensor; state_bits=8 would make scales of each rank's own blocks, which no other sharding "
            "could load. Needed is 32 or 16."
        )


def uses(group: Mapping[str, Any]) -> bool:
    """Whether any of the flags is set."""
    return bool(group["kahan_sum"] or group["stochastic_rounding"] or group["state_bits"] != 32)


def compressed(group: Mapping[str, Any], param: Tensor, rule: Rule) -> Mapping[str, bool]:
    """States of ``param`` that begin in fewer than 32 bits, and whether each has a sign."""
    bits = group["state_bits"]
    return {} if bits == 32 or (bits == 8 and param.numel() < SMALL) else rule.compressible


def zeros(name: str, param: Tensor, group: Mapping[str, Any], signed: bool) -> dict[str, Tensor]:
    """The state ``name`` of a parameter before its first step, as `state_bits` says."""
    if group["state_bits"] == 16:
        return {name: torch.zeros_like(param, dtype=torch.bfloat16, memory_format=torch.preserve_format)}
    codes, scales = quantization.zeros(param, signed)
    return {name: codes, f"{name}_scale": scales}


def storage(
    group: Mapping[str, Any], param: Tensor, rule: Rule, state: Mapping[str, Any]
) -> tuple[bool, tuple[str, ...]]:
    """Whether ``param`` is compensated, and which of its arrays are rounded stochastically.

    The first two flags stand in for wider parameters, and have no effect where these are wide. Of the state its own
    dtype decides, so that loaded state keeps the form it has.
    """
    rounded = ["param"] if group["stochastic_rounding"] and param.dtype == torch.bfloat16 else []
    low = (torch.bfloat16, torch.uint8) if group["state_bits"] != 32 else (torch.uint8,)
    rounded += [name for name in rule.compressible if name in state and state[name].dtype in low]
    return group["kahan_sum"] and param.dtype in HALF, tuple(rounded)


def has_codes(state: Mapping[str, Any], rule: Rule) -> bool:
    """Whether some of ``state`` is in 8 bits, whatever the flags say now."""
    return any(name in state and state[name].dtype == torch.uint8 for name in rule.compressible)


def companions(state: Mapping[str, Any]) -> list[str]:
    """Names of the arrays in ``state`` that are not the rule's own: compensation, scales, initial weights."""
    return [name for name in state if name in ("kahan_comp", INITIAL) or name.endswith("_scale")]


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], rule: Rule, position: int) -> None:
    """Add to ``state`` what the flags need in addition to the rule's own state, where it is missing.

    Args:
        state: Of ``param``; written.
        param: The parameter.
        group: Its group.
        rule: What updates it.
        position: Its place among all parameters of the optimizer; makes its noise its own.
    """
    if group["kahan_sum"] and param.dtype in HALF and "kahan_comp" not in state:
        state["kahan_comp"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    _, rounded = storage(group, param, rule, state)
    if (rounded or compressed(group, param, rule)) and "rounding_key" not in state:
        key = first_key(int(group.get("rounding_seed", 0)), position)
        state["rounding_key"] = torch.full((), key, dtype=torch.int64, device=param.device)
