"""State of the averages of weights that the option `ema` asks for: names, first values, and what a step refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.averages import STEP, kept_by, state_names
from lightning_optim.kernels.base import arithmetic_dtype

_NAME = re.compile(r"ema_\d+")


def is_average(name: str) -> bool:
    """Return whether a state called ``name`` is an average of the parameter."""
    return _NAME.fullmatch(name) is not None


def names_in(state: Iterable[str]) -> list[str]:
    """Return the names in ``state`` that belong to averages."""
    return [name for name in state if name == STEP or is_average(name)]


def complete(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Add to ``state`` the averages that are missing, which begin at the present weights, and their step count.

    Averages that the group no longer has are dropped, because they would continue from old weights if it had them
    again. Averages are stored in float32, or float64 for float64 parameters: in 16 bits they would not move by a
    thousandth.

    Args:
        state: State of ``param``, modified in place.
        param: The parameter.
        group: Its parameter group.
    """
    wanted = state_names(len(kept_by(group)))
    if not group.get("averaged"):  # Otherwise the weights of training are in one of them.
        for name in names_in(state):
            if name not in wanted and not (wanted and name == STEP):
                del state[name]
    if not wanted:
        return
    dtype = arithmetic_dtype(param.dtype)
    for name in wanted:
        if name not in state:
            state[name] = param.detach().to(dtype, copy=True, memory_format=torch.preserve_format)
        elif state[name].dtype != dtype:
            state[name] = state[name].to(dtype)
    count = state.get(STEP)
    if count is None:
        wide = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        state[STEP] = torch.zeros((), dtype=wide, device=param.device)
    elif count.device != param.device:
        state[STEP] = count.to(param.device)


def refuse_step(owner: str) -> None:
    """Refuse to update parameters that are at an average.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"{owner}: the parameters are at an average of the weights, from which a step must not start. Call "
        "lightning_optim.optim.swap_out_average(optimizer) first; in Lightning, and after a checkpoint that was saved "
        "with it, the callback WeightAverage does this."
    )
