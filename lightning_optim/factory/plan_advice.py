"""What an optimizer was set to, and what is unusual about it, for the plan of a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.optim.base import OPTIMIZERS, FusedOptimizer, class_of_rule

_SHOWN = ("lr", "betas", "momentum", "eps", "weight_decay")
"""Hyperparameters that are shown whatever their values."""

_HOW = {"foreach", "maximize", "capturable", "differentiable", "fused", "peak_lr", "train_mode", "param_names"}
"""Entries of a group that are no hyperparameters, or say how a step is computed."""


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return the class of an optimizer with its hyperparameters: the usual ones, and those that are not the default.

    Args:
        optimizer: The optimizer; it is not changed.

    Example:
        >>> import torch
        >>> describe_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1, nesterov=True, momentum=0.9))
        'torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0, nesterov=True)'
    """
    cls = type(optimizer)
    package = "lightning_optim.optim" if cls.__module__.startswith("lightning_optim.optim.") else cls.__module__
    package = "torch.optim" if cls.__module__.startswith("torch.optim.") else package
    usual = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    shown = {name: optimizer.defaults[name] for name in _SHOWN if name in optimizer.defaults}
    for name, value in optimizer.defaults.items():
        if name not in shown and name not in _HOW and _differs(value, usual.get(name, value)):
            shown[name] = value
    return f"{package}.{cls.__name__}({', '.join(f'{name}={_plain(value)}' for name, value in shown.items())})"


def rate_notes(optimizer: Optimizer) -> list[str]:
    """Return a sentence for each learning rate far from those of published recipes, by the class that it is for.

    The rate of a group whose multiplier or rule sets it apart from the others is the user's choice, and is left alone.

    Args:
        optimizer: The optimizer, of this package or of another one with an optimizer of the same name.
    """
    notes = []
    seen: dict[type, float] = {}
    for group in optimizer.param_groups:
        cls, own = _class_of(optimizer, group)
        if cls is None or cls in seen:
            continue
        seen[cls] = rate = float(group.get("initial_lr", group["lr"]) if own else optimizer.defaults["lr"])
        usual = cls.usual_lr_of(group if isinstance(optimizer, FusedOptimizer) else cls.hyperparameters())
        if usual is None or usual[0] <= rate <= usual[1] or rate == 0:
            continue
        low = rate < usual[0]
        notes.append(
            f"lr={rate:g} is {'low' if low else 'high'} for {cls.__name__}, for which {usual[0]:g} to {usual[1]:g} is "
            f"usual: the weights {'may hardly move' if low else 'may diverge'}."
        )
    return notes


def usual_lr(optimizer: Optimizer) -> tuple[float, float] | None:
    """Return the rates that are usual for an optimizer; None if they are not known.

    Args:
        optimizer: The optimizer, of this package or of another one with an optimizer of the same name.
    """
    group = optimizer.param_groups[0]
    cls, _ = _class_of(optimizer, group)
    if cls is None:
        return None
    return cls.usual_lr_of(group if isinstance(optimizer, FusedOptimizer) else cls.hyperparameters())


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Return whether an optimizer trains at one point and is evaluated at another, as Schedule-Free ones do."""
    return "schedulefree" in f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()


def _class_of(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[type[FusedOptimizer] | None, bool]:
    """The class of this package whose rates count for a group, and whether the group names it by a rule of its own."""
    if isinstance(optimizer, FusedOptimizer):
        rule = group.get("rule")
        return (type(optimizer), False) if rule is None else (class_of_rule(rule), True)
    try:
        found = OPTIMIZERS.get(type(optimizer).__name__)
    except ValueError:
        return None, False
    return (found if issubclass(found, FusedOptimizer) else None), False


def _differs(value: Any, usual: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(usual, Tensor):
        return False
    return bool(value != usual)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
