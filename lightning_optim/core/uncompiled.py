"""Exclusion of optimizer steps and their hooks from `torch.compile`, so that they run eagerly inside compiled code.

A step reads raw addresses and, on first use, compiles kernels. Dynamo would trace into numba's compiler, treat step
counts as constants and recompile for each of them. Therefore a compiled training step has a graph break at
``optimizer.step()``, and ``torch.compile(optimizer.step)`` is the eager step.

Call these functions only after an optimizer has been created: they import Dynamo, as torch does for its first
optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` excluded from tracing; step hooks need this, because compiled torch optimizers trace them."""
    reason = "the steps of lightning_optim cannot be traced into a graph"
    untraced: Callable[P, R] = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
    return untraced


def leave_step_uncompiled(cls: type[Optimizer]) -> None:
    """Exclude ``cls.step`` from tracing, together with the step hooks.

    Args:
        cls: A class that has an instance, because torch adds the calls of the hooks to ``step`` at construction.
    """
    if not getattr(cls.step, "left_uncompiled", False):
        cls.step = uncompiled(cls.step)  # type: ignore[assignment, method-assign]
        cls.step.left_uncompiled = True  # type: ignore[attr-defined]
