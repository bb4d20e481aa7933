"""Fused optimizers under torch's names: one pass over memory per step, on every backend."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lightning_optim.core.suggest import nearest
from lightning_optim.optim.adafactor import Adafactor
from lightning_optim.optim.adagrad import Adagrad
from lightning_optim.optim.adam import Adam
from lightning_optim.optim.adamw import AdamW
from lightning_optim.optim.adan import Adan
from lightning_optim.optim.ademamix import AdEMAMix
from lightning_optim.optim.adopt import ADOPT
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.hidden_matrices import muon_param_groups
from lightning_optim.optim.lamb import LAMB
from lightning_optim.optim.lars import LARS
from lightning_optim.optim.lion import Lion
from lightning_optim.optim.muon import Muon
from lightning_optim.optim.nadam import NAdam
from lightning_optim.optim.nadamw import NAdamW
from lightning_optim.optim.normuon import NorMuon
from lightning_optim.optim.prodigy import Prodigy
from lightning_optim.optim.radam import RAdam
from lightning_optim.optim.rmsprop import RMSprop
from lightning_optim.optim.schedule_free import ScheduleFreeAdamW
from lightning_optim.optim.sgd import SGD
from lightning_optim.optim.soap import SOAP
from lightning_optim.optim.stableadamw import StableAdamW

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "NAdamW",
    "NorMuon",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "StableAdamW",
    "get_optimizer_class",
    "list_optimizers",
    "muon_param_groups",
]


def _classes() -> dict[str, type[FusedOptimizer]]:
    exported = {name.lower(): globals()[name] for name in __all__}
    return {
        name: value
        for name, value in sorted(exported.items())
        if isinstance(value, type) and issubclass(value, FusedOptimizer) and value is not FusedOptimizer
    }


def list_optimizers(pattern: str = "*") -> dict[str, str]:
    """Optimizers whose lower-case name matches ``pattern``, each with a line: when to use it, memory, paper.

    Args:
        pattern: A shell-style wildcard.

    Example:
        >>> print(*list_optimizers("*adam"))
        adam nadam radam
    """
    lines = {name: f"{c.when_to_use} State: {c.memory} per parameter. {c.paper}" for name, c in _classes().items()}
    return {name: line for name, line in lines.items() if fnmatchcase(name, pattern.lower())}


def get_optimizer_class(name: str) -> type[FusedOptimizer]:
    """The class called ``name``, in any case.

    Example:
        >>> get_optimizer_class("adamw").__name__
        'AdamW'
    """
    classes = _classes()
    if name.lower() not in classes:
        raise ValueError(f"optimizer {name!r} is unknown. {nearest(name, classes)}")
    return classes[name.lower()]
