"""Conversion of optimizer state from other sources, or for other parameter dtypes, to the dtype of the arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.base import arithmetic_dtype
from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.weight_decay import INITIAL
from lightning_optim.optim.sharded_codes import values_of


def widen(state: dict[str, Any], names: Iterable[str], param: Tensor, group: Mapping[str, Any], rule: Rule) -> set[str]:
    """Convert the arrays of a rule to the dtype of its arithmetic: float32, or float64 for float64 parameters.

    torch stores moments in the dtype of the parameters. A second moment in bf16 that should decrease by a thousandth
    does not change, so that steps silently become too small. State that `state_bits` stores in fewer bits is rounded
    stochastically instead, and is not converted.

    Args:
        state: State of ``param``, modified in place.
        names: Names of the rule's own arrays; missing ones are ignored.
        param: The parameter.
        group: Its parameter group.
        rule: The rule that updates it.

    Returns:
        Descriptions of the conversions, for `warn_of_conversions`, without those from float32 to float64, which lose
        nothing.
    """
    changes = set()
    wide = arithmetic_dtype(param.dtype)
    low = torch.bfloat16 if group["state_bits"] != 32 else None
    for name in set(names) & state.keys():
        old = state[name]
        if old.dtype == torch.uint8 and wide == torch.float64 and f"{name}_scale" in state:
            state[name] = values_of(old, state.pop(f"{name}_scale"), rule.compressible[name]).to(wide)
        if not old.is_floating_point() or old.dtype == wide or (old.dtype == low and name in rule.compressible):
            continue
        state[name] = old.to(wide)
        if (old.dtype, wide) != (torch.float32, torch.float64):
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (old.dtype, wide, param.dtype)]
            changes.add(
                "was stored in {} is converted to {}, the dtype of the arithmetic for {} parameters".format(*dtypes)
            )
    if INITIAL in state and state[INITIAL].dtype != param.dtype:
        state[INITIAL] = state[INITIAL].to(param.dtype)
    return changes


def warn_of_conversions(changes: set[str]) -> None:
    """Warn of each conversion returned by `widen`."""
    for change in sorted(changes):
        warnings.warn(
            f"Optimizer state that {change}. To store moments in 16 bits with stochastic rounding, which preserves "
            "small changes, set state_bits=16.",
            stacklevel=4,
        )
