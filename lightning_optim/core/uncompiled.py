"""Keeps `torch.compile` out of what surrounds and makes a step: it runs as without it, in the midst of compiled code.

A step reads raw addresses and, the first time, compiles kernels of its own. Dynamo would trace into numba's compiler,
take step counts for constants and compile again for each of them. So a compiled training step breaks its graph at
``optimizer.step()``, and ``torch.compile(optimizer.step)`` is the step itself.

Call these only where an optimizer exists: to ask for it imports Dynamo, as torch does for its first optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, never traced, whoever calls it; for step hooks, which torch's compiled optimizers trace too."""
    reason = "the steps of lightning_optim are no graphs of torch"
    untraced: Callable[P, R] = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
    return untraced


def leave_step_uncompiled(cls: type[Optimizer]) -> None:
    """Have ``cls.step`` run outside of any trace, together with the step hooks.

    Args:
        cls: A class of which an instance has been made: then torch has put the calls of the hooks into ``step``.
    """
    if not getattr(cls.step, "left_uncompiled", False):
        cls.step = uncompiled(cls.step)  # type: ignore[assignment, method-assign]
        cls.step.left_uncompiled = True  # type: ignore[attr-defined]
