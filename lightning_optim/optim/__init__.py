"""Fused optimizers under torch's names, with one pass over memory per step on every backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch.optim import Optimizer

from lightning_optim.core.ranges import Range
from lightning_optim.kernels.decay_kind import DECAY_KINDS, DecayKind
from lightning_optim.optim.adafactor import Adafactor
from lightning_optim.optim.adagrad import Adagrad
from lightning_optim.optim.adam import Adam
from lightning_optim.optim.adamw import AdamW
from lightning_optim.optim.adan import Adan
from lightning_optim.optim.ademamix import AdEMAMix
from lightning_optim.optim.adopt import ADOPT
from lightning_optim.optim.averaged_weights import (
    averaged_weights,
    ema_state_dict,
    swap_in_average,
    swap_out_average,
)
from lightning_optim.optim.base import OPTIMIZERS, FusedOptimizer
from lightning_optim.optim.hidden_matrices import muon_param_groups
from lightning_optim.optim.lamb import LAMB
from lightning_optim.optim.lars import LARS
from lightning_optim.optim.lion import Lion
from lightning_optim.optim.muon import Muon
from lightning_optim.optim.nadam import NAdam
from lightning_optim.optim.nadamw import NAdamW
from lightning_optim.optim.normuon import NorMuon
from lightning_optim.optim.ns_coefficients import PRESETS as NS_COEFFICIENTS
from lightning_optim.optim.prodigy import Prodigy
from lightning_optim.optim.radam import RAdam
from lightning_optim.optim.rmsprop import RMSprop
from lightning_optim.optim.schedule_free import ScheduleFreeAdamW
from lightning_optim.optim.sgd import SGD
from lightning_optim.optim.shared_options import SharedOptions
from lightning_optim.optim.soap import SOAP
from lightning_optim.optim.stableadamw import StableAdamW

C = TypeVar("C", bound=type)

__all__ = [
    "ADOPT",
    "DECAY_KINDS",
    "LAMB",
    "LARS",
    "NS_COEFFICIENTS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "DecayKind",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "NAdamW",
    "NorMuon",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Range",
    "ScheduleFreeAdamW",
    "SharedOptions",
    "StableAdamW",
    "averaged_weights",
    "ema_state_dict",
    "get_optimizer_class",
    "list_optimizers",
    "muon_param_groups",
    "register",
    "swap_in_average",
    "swap_out_average",
]


@overload
def register(cls: C, *, name: str | None = None) -> C: ...
@overload
def register(cls: str | None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Register an optimizer of your own, or a `DecayKind`, under a name; see `lightning_optim.register`.

    An installed package brings its own as entry points of the groups `lightning_optim.optimizers` and
    `lightning_optim.weight_decay_kinds`.

    Args:
        cls: The class, or its name if this is a decorator.
        name: Its name; by default the class name in lower case with underscores.

    Returns:
        The class itself; a decorator if ``cls`` is a name or None.

    Raises:
        TypeError: The class is neither an optimizer nor a `DecayKind`.
        ValueError: Another class, or that of an installed package, has the name.

    Example:
        >>> @register("halved")
        ... class Halved(SGD):
        ...     pass
        >>> get_optimizer_class("halved").__name__
        'Halved'
        >>> OPTIMIZERS.remove("halved")
    """
    if cls is None or isinstance(cls, str):
        return lambda decorated: register(decorated, name=name if cls is None else cls)
    registry: Any = DECAY_KINDS if isinstance(cls, type) and issubclass(cls, DecayKind) else OPTIMIZERS
    return registry.register(cls, name=name)


for _name in __all__:
    _exported = globals().get(_name)
    if isinstance(_exported, type) and issubclass(_exported, FusedOptimizer) and _exported is not FusedOptimizer:
        OPTIMIZERS.add(_exported, _name)


def list_optimizers(pattern: str = "*") -> dict[str, str]:
    """Return the optimizers whose lower-case names match ``pattern``, each with a line on its use, memory and paper.

    Args:
        pattern: A shell-style wildcard.

    Example:
        >>> print(*list_optimizers("*adam"))
        adam nadam radam
    """
    return {name: _line(cls) for name, cls in OPTIMIZERS.items(pattern)}


def _classes() -> dict[str, type[FusedOptimizer]]:
    """Return the optimizers that are FusedOptimizers, by name."""
    return {name: cls for name, cls in OPTIMIZERS.items() if issubclass(cls, FusedOptimizer)}


def _line(cls: type[Optimizer]) -> str:
    if issubclass(cls, FusedOptimizer) and all(hasattr(cls, name) for name in ("when_to_use", "memory", "paper")):
        return f"{cls.when_to_use} State: {cls.memory} per parameter. {cls.paper}"
    return (inspect.getdoc(cls) or "").partition("\n")[0]  # The class was registered by a user.


def get_optimizer_class(name: str) -> type[Optimizer]:
    """Return the class called ``name``, which is not case-sensitive and may have been registered by a user.

    Raises:
        ValueError: No class has that name; the message suggests the nearest one.

    Example:
        >>> get_optimizer_class("adamw").__name__
        'AdamW'
    """
    return OPTIMIZERS.get(name)
