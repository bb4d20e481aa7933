"""Hooks that need gradients run the closure themselves: torch calls step pre-hooks before it."""

from __future__ import annotations

from typing import Any

import torch


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure among the arguments of ``step``, as a pre-hook gets them, the optimizer first; None without one."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def run_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Runs the closure now, because gradients exist only afterwards, and leaves one that returns the known loss.

    Args:
        args: Positional arguments of ``step``, the optimizer first.
        kwargs: Its keyword arguments.
    """
    closure = closure_of(args, kwargs)
    if closure is None:
        return args, kwargs, None
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}, loss
    return (args[0], lambda: loss, *args[2:]), kwargs, loss
