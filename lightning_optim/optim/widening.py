"""Brings state that was made elsewhere, or for parameters of another dtype, into the dtype of the arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.base import arithmetic_dtype
from lightning_optim.kernels.quantization import dequantize
from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.weight_decay import INITIAL


def widen(state: dict[str, Any], names: Iterable[str], param: Tensor, group: Mapping[str, Any], rule: Rule) -> set[str]:
    """Convert the arrays of a rule to the dtype that it computes in: float32, or float64 for float64 parameters.

    torch keeps moments in the dtype of the parameters. A second moment in bf16 that should fall by a thousandth of
    itself does not change, so steps become too small without any sign of it. State that `state_bits` keeps in fewer
    bits is rounded stochastically instead, and stays as it is.

    Args:
        state: Of ``param``; written.
        names: Of the rule's own arrays; those that are missing are passed over.
        param: The parameter.
        group: Its group.
        rule: What updates it.

    Returns:
        The changes to report, for `say`. A change from float32 to float64 is not among them, for it loses nothing.
    """
    changes = set()
    wide = arithmetic_dtype(param.dtype)
    low = torch.bfloat16 if group["state_bits"] != 32 else None
    for name in set(names) & state.keys():
        old = state[name]
        if old.dtype == torch.uint8 and wide == torch.float64 and f"{name}_scale" in state:
            state[name] = dequantize(old, state.pop(f"{name}_scale"), rule.compressible[name]).to(wide)
        if not old.is_floating_point() or old.dtype == wide or (old.dtype == low and name in rule.compressible):
            continue
        state[name] = old.to(wide)
        if (old.dtype, wide) != (torch.float32, torch.float64):
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (old.dtype, wide, param.dtype)]
            changes.add(
                "was kept in {} goes on in {}, the dtype of the arithmetic beside {} parameters".format(*dtypes)
            )
    if INITIAL in state and state[INITIAL].dtype != param.dtype:
        state[INITIAL] = state[INITIAL].to(param.dtype)
    return changes


def say(changes: set[str]) -> None:
    """Warn of each of the changes that `widen` made."""
    for change in sorted(changes):
        warnings.warn(
            f"Optimizer state that {change}. To keep moments in 16 bits, which are then rounded stochastically, so "
            "that they can move by little, set state_bits=16.",
            stacklevel=4,
        )
