"""Options of low precision (Kahan sums, stochastic rounding, bits of state): their checks and the state they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.rounding import first_key
from lightning_optim.kernels.rules import Rule, UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL
from lightning_optim.optim import sharded_codes
from lightning_optim.optim.sharded_codes import has_rows

FLAGS = ("kahan_sum", "kahan_bits", "stochastic_rounding", "state_bits")
"""The shared options that this module implements."""

HALF = (torch.bfloat16, torch.float16)
SMALL = 4096
"""Tensors with fewer elements keep 32-bit state under `state_bits=8`, because they take little memory and the sensitive
tensors (norms, biases) are small. The value is that of the paper on 8-bit optimizers."""


def check(owner: str, group: Mapping[str, Any], rule: Rule) -> None:
    """Check that the options of ``group`` are consistent with each other and with ``rule``.

    Args:
        owner: Name of the optimizer, for messages.
        group: The complete parameter group.
        rule: The rule that updates the group.

    Raises:
        ValueError: The options contradict each other, or ``rule`` does not support them.
    """
    if group["kahan_sum"] and group["stochastic_rounding"]:
        raise ValueError(
            f"{owner}: kahan_sum=True and stochastic_rounding=True are alternatives; choose one. kahan_sum is more "
            "exact, stochastic_rounding needs no memory."
        )
    kept = group["kahan_bits"]
    if not isinstance(kept, int) or isinstance(kept, bool) or kept not in (16, 8):
        raise ValueError(f"{owner}: Invalid kahan_bits={kept!r}: must be 16 or 8.")
    if kept != 16 and not group["kahan_sum"]:
        raise ValueError(
            f"{owner}: kahan_bits={kept} has no effect without kahan_sum=True; set that, or kahan_bits=16 in a group "
            "without it."
        )
    bits = group["state_bits"]
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in (32, 16, 8):
        raise ValueError(f"{owner}: Invalid state_bits={bits!r}: must be 32, 16 or 8.")
    if bits == 32 or rule.compressible:
        return
    if isinstance(rule, UpdateRule) and not rule.state:
        reason = "it keeps no state with these settings"
    else:
        reason = "its state is no moment of gradients (weights, matrix factors, parts of a difference)"
    raise ValueError(f"{owner}: Invalid state_bits={bits}: must be 32, because {reason}.")


def check_param(label: str, group: Mapping[str, Any], param: Tensor) -> None:
    """Check that ``param``, of any shape, supports the options of ``group``.

    Args:
        label: Name of the parameter, for messages.
        group: The complete parameter group.
        param: The parameter.

    Raises:
        ValueError: The dtype or the sharding of the parameter does not support an option.
    """
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(
            f"{label} is float16, whose subnormal numbers have fewer bits; stochastic_rounding=True supports bfloat16 "
            "only. Use kahan_sum=True, or bfloat16 parameters."
        )
    if group["kahan_bits"] == 8 and param.dtype == torch.float16:
        raise ValueError(
            f"{label} is float16, which has other bits than the upper half of a float32; kahan_bits=8 supports "
            "bfloat16 only. Use kahan_bits=16, or bfloat16 parameters."
        )
    if group["state_bits"] != 32 and param.dtype == torch.float64:
        raise ValueError(
            f"{label} is float64, whose precision state_bits={group['state_bits']} would lose; state_bits must be 32."
        )
    if group["state_bits"] == 8 and (reason := sharded_codes.why_not(param)) is not None:
        raise ValueError(
            f"{label} cannot have 8-bit state: {reason}. Set state_bits to 16 or 32 in a group with this parameter, or "
            "shard it along another dimension."
        )


def uses(group: Mapping[str, Any]) -> bool:
    """Return whether any of the options is set."""
    return bool(group["kahan_sum"] or group["stochastic_rounding"] or group["state_bits"] != 32)


def compressed(group: Mapping[str, Any], param: Tensor, rule: Rule) -> Mapping[str, bool]:
    """Return the states of ``param`` that are created in fewer than 32 bits, and whether each is signed."""
    bits = group["state_bits"]
    if bits == 8 and (param.numel() < SMALL or (hasattr(param, "device_mesh") and not has_rows(param.shape))):
        return {}
    return {} if bits == 32 else rule.compressible


def initial(name: str, value: float, param: Tensor, group: Mapping[str, Any], signed: bool) -> dict[str, Tensor]:
    """Create the state ``name`` of a parameter before its first step, in the format given by `state_bits`.

    Args:
        name: Name of the state.
        value: Initial value of all elements, not negative.
        param: The parameter.
        group: Its parameter group.
        signed: Whether the state is signed.

    Returns:
        The state by name, with its scales if it is stored in 8 bits.
    """
    if group["state_bits"] == 16:
        state = torch.zeros_like(param, dtype=torch.bfloat16, memory_format=torch.preserve_format)
        return {name: state + value if value else state}
    codes, scales = sharded_codes.new_codes(param, value, signed)
    return {name: codes, f"{name}_scale": scales}


def storage(
    group: Mapping[str, Any], param: Tensor, rule: Rule, state: Mapping[str, Any]
) -> tuple[bool, tuple[str, ...]]:
    """Return whether ``param`` has Kahan compensation, and the names of its arrays that are rounded stochastically.

    `kahan_sum` and `stochastic_rounding` replace wider parameters, and have no effect on float32 and float64. The
    rounding of state depends on its present dtype, so that loaded state keeps its format.
    """
    rounded = ["param"] if group["stochastic_rounding"] and param.dtype == torch.bfloat16 else []
    low = (torch.bfloat16, torch.uint8) if group["state_bits"] != 32 else (torch.uint8,)
    rounded += [name for name in rule.compressible if name in state and state[name].dtype in low]
    kahan = group["kahan_sum"] and param.dtype in HALF
    rounded += ["kahan_comp"] if kahan and state["kahan_comp"].dtype == torch.int8 else []
    return kahan, tuple(rounded)


def has_codes(state: Mapping[str, Any], rule: Rule) -> bool:
    """Return whether some of ``state`` is stored in 8 bits, regardless of the present options."""
    return any(name in state and state[name].dtype == torch.uint8 for name in rule.compressible)


def companions(state: Mapping[str, Any]) -> list[str]:
    """Return the names of arrays in ``state`` that do not belong to the rule: compensation, scales, initial weights."""
    return [name for name in state if name in ("kahan_comp", INITIAL) or name.endswith("_scale")]


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], rule: Rule, position: int) -> None:
    """Add to ``state`` missing entries that the options need in addition to the rule's own state.

    Args:
        state: State of ``param``, modified in place.
        param: The parameter.
        group: Its parameter group.
        rule: The rule that updates it.
        position: Index of the parameter in the optimizer, from which its random numbers are derived.
    """
    if group["kahan_sum"] and param.dtype in HALF and "kahan_comp" not in state:
        dtype = torch.int8 if group["kahan_bits"] == 8 else param.dtype
        state["kahan_comp"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    _, rounded = storage(group, param, rule, state)
    if (rounded or compressed(group, param, rule)) and "rounding_key" not in state:
        key = first_key(int(group.get("rounding_seed", 0)), position)
        state["rounding_key"] = torch.full((), key, dtype=torch.int64, device=param.device)
