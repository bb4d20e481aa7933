"""Which class an optimizer's saved state is of: by its name, or by its hyperparameters where no name was saved."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_optim.core.group_keys import GROUP_KEYS, is_scheduled
from lightning_optim.optim import shared_options
from lightning_optim.optim.base import OPTIMIZERS, class_of_rule

KEY = "optimizer_class"
"""Where a state dict has the import path of its optimizer's class."""

_GENERAL = frozenset(
    {"lr", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
)
"""Hyperparameters that say nothing of the kind of update."""
_LIBRARIES = ("torch.", "lightning_optim.")


def note_class(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Write the optimizer's class into its state dict; a hook for ``register_state_dict_post_hook``."""
    cls = type(optimizer)
    state_dict[KEY] = f"{cls.__module__}.{cls.__qualname__}"


def saved_class(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> str | None:
    """Return the name of the class that ``state_dict`` is of, if it is another one than the optimizer's; else None.

    Classes of one name are one optimizer: a state of torch's AdamW is one of ours, and back. So are a user's class and
    that of torch or this package which it is derived from. Without a saved name, the hyperparameters in the groups
    decide, as far as they can: what matches neither the optimizer nor any known one is taken to be the optimizer's.

    Args:
        optimizer: The optimizer that the state is for.
        state_dict: As its ``state_dict`` returns it, or that of another class.

    Returns:
        The name of the other class; several with "or" between them where they have the same hyperparameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> state_dict = torch.optim.AdamW([weight]).state_dict()
        >>> saved_class(torch.optim.SGD([weight]), state_dict)
        'AdamW'
        >>> saved_class(torch.optim.AdamW([weight]), state_dict) is None
        True
    """
    if (path := state_dict.get(KEY)) is not None:
        name = str(path).rpartition(".")[2]
        return None if name in _names(type(optimizer)) else name
    plain = [group for group in state_dict["param_groups"] if group.get("rule") is None]
    there = {_traits(group) for group in plain}
    here = {_traits(group) for group in optimizer.param_groups if group.get("rule") is None}
    decoupled = {group["decoupled_weight_decay"] for group in plain if "decoupled_weight_decay" in group}
    candidates = [name for name, traits in _known().items() if traits in there]
    if {"Adam", "AdamW"} <= set(candidates) and len(decoupled) == 1:
        candidates.remove("Adam" if decoupled == {True} else "AdamW")
    elif there & here or not (there and here):
        return None
    if not candidates or _names(type(optimizer)) & set(candidates):
        return None
    return " or ".join(candidates)


def class_of_group(group: Mapping[str, Any], owner: str) -> str:
    """Return the name of the class whose update a group has: its own rule's, or that of the optimizer, ``owner``."""
    rule = group.get("rule")
    return owner if rule is None else class_of_rule(rule).__name__


def _names(cls: type) -> set[str]:
    """The class's own name, and of a user's class those of its bases up to the first of a library."""
    names = set()
    for base in cls.__mro__:
        if base is Optimizer:
            break
        names.add(base.__name__)
        if base.__module__.startswith(_LIBRARIES):
            break
    return names


def _traits(group: Mapping[str, Any]) -> frozenset[str]:
    return _distinctive(key for key in group if not is_scheduled(key))


def _distinctive(names: Iterable[str]) -> frozenset[str]:
    return frozenset(names).difference(_GENERAL, GROUP_KEYS, shared_options.DEFAULTS, ("self", "params"))


@cache
def _known() -> dict[str, frozenset[str]]:
    """The distinctive hyperparameters of each class of torch and of this package, by the class's name."""
    torchs = [cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, Optimizer)]
    found = {}
    for cls in (*torchs, *(cls for _, cls in OPTIMIZERS.items("*"))):
        if cls is not Optimizer and cls.__module__.startswith(_LIBRARIES):
            found[cls.__name__] = _distinctive(inspect.signature(cls).parameters)
    return found
