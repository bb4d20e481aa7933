"""Creation of the state of a parameter, on its first step or after an option has been switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.placements import is_sharded
from lightning_optim.core.shards import placed_state
from lightning_optim.kernels.base import arithmetic_dtype
from lightning_optim.kernels.rules import Rule, TensorRule, UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL, decay_form
from lightning_optim.optim import low_precision, weight_averages
from lightning_optim.optim.sharded_codes import has_rows
from lightning_optim.optim.widening import warn_of_conversions, widen


def complete_state(
    state: dict[str, Any], param: Tensor, group: dict[str, Any], rule: Rule, position: int
) -> dict[str, Any]:
    """Add to ``state`` the missing entries that ``rule`` needs.

    Args:
        state: State of ``param``, modified in place.
        param: The parameter.
        group: Its parameter group.
        rule: The rule that updates it.
        position: Index of the parameter in the optimizer.

    Returns:
        ``state``.
    """
    begun = rule.state[0] in state if rule.state else isinstance(rule, TensorRule) and bool(tensor_names(rule, state))
    if state:
        warn_of_conversions(widen(state, tensor_names(rule, state), param, group, rule))
    if low_precision.uses(group) or low_precision.has_codes(state, rule):
        low_precision.complete(state, param, group, rule, position)
    weight_averages.complete(state, param, group)
    if decay_form(group) == "toward_initial" and INITIAL not in state:
        state[INITIAL] = param.detach().clone(memory_format=torch.preserve_format)
    if rule.counts_steps and "step" in state and state["step"].device != param.device:
        # Lightning, like torch, does not move `step` when it moves state to another device.
        state |= {n: state[n].to(param.device) for n in ("step", *rule.scalar_state)}
    if isinstance(rule, TensorRule):
        if not begun:
            _complete_tensor_rule(state, param, group, rule)
        if is_sharded(param):
            state |= {name: placed_state(state[name], param) for name in tensor_names(rule, state)}
    else:
        assert isinstance(rule, UpdateRule)
        _complete_elementwise(state, param, group, rule)
    if rule.counts_steps and "step" not in state:
        # torch's SGD does not count steps, but if there is a momentum, there has been a step.
        state["step"] = _step_count(1.0 if begun else 0.0, param)
    for name, at_first in rule.scalar_state.items():
        if name not in state:
            state[name] = torch.full((), at_first, dtype=widest_dtype(param.device), device=param.device)
    return state


def state_bytes(param: Tensor, group: dict[str, Any], rule: Rule) -> int | None:
    """Return the size in bytes of the state that ``rule`` will keep of a parameter, without allocating any.

    Args:
        param: The parameter; only its shape and dtype are read.
        group: Its parameter group.
        rule: The rule that will update it.

    Returns:
        The size, or None if it does not follow from the shape and dtype of the parameter.
    """
    shape_only = torch.empty(param.shape, dtype=param.dtype, device="meta")
    if group["state_bits"] == 8 and hasattr(param, "device_mesh") and not has_rows(param.shape):
        group = group | {"state_bits": 32}
    try:
        state = complete_state({}, shape_only, group, rule, 0)
    except (KeyError, RuntimeError):  # The state depends on values, or on numbers of the first step.
        return None
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def tensor_names(rule: Rule, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of arrays in ``state`` that belong to the rule, which may depend on the parameter."""
    if isinstance(rule, UpdateRule):
        return rule.state
    others = {"step", "rounding_key", *low_precision.companions(state), *rule.scalar_state}
    others |= set(weight_averages.names_in(state))
    return tuple(name for name, value in state.items() if isinstance(value, Tensor) and name not in others)


def _complete_tensor_rule(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], rule: TensorRule) -> None:
    dtype = arithmetic_dtype(param.dtype)
    low = low_precision.compressed(group, param, rule)
    for name, tensor in rule.init_state(param, group).items():
        assert isinstance(tensor, Tensor)
        if name in state:
            continue
        if name in low:
            state |= low_precision.initial(name, 0.0, param, group, low[name])
        else:
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor


def _complete_elementwise(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], rule: UpdateRule) -> None:
    dtype = arithmetic_dtype(param.dtype)  # A bf16 second moment could not change by a thousandth.
    first = rule.init_state(param, group)
    low = low_precision.compressed(group, param, rule)
    for name in rule.state:
        if name in state:
            continue
        value = first.get(name, 0.0)
        if name in low and not isinstance(value, Tensor):
            state |= low_precision.initial(name, value, param, group, low[name])
            continue
        if isinstance(value, Tensor):
            state[name] = value.detach().to(dtype, copy=True, memory_format=torch.preserve_format)
        else:  # Tensor subclasses usually support zeros_like, but rarely full_like.
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            if value:
                state[name] += value


def _step_count(value: float, param: Tensor) -> Tensor:
    """Create a step count in torch's dtype for it: float32, or float64 if that is torch's default dtype."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.full((), value, dtype=dtype, device=param.device)
