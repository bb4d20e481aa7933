"""The registry of schedules by name, with the names in Hugging Face and timm as aliases."""

from __future__ import annotations

from lightning_optim.core.registry import Registry
from lightning_optim.schedules.base import Schedule
from lightning_optim.schedules.compositions import WSD, OneCycle
from lightning_optim.schedules.plateau import ReduceOnPlateau
from lightning_optim.schedules.restarts import CosineRestarts
from lightning_optim.schedules.shapes import REX, Constant, Cosine, Exponential, InverseSqrt, Linear, Polynomial, Tanh
from lightning_optim.schedules.stepped import MultiStepDecay, StepDecay

_BUILT_IN: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "cosine_restarts": CosineRestarts,
    "exponential": Exponential,
    "inverse_sqrt": InverseSqrt,
    "linear": Linear,
    "multi_step": MultiStepDecay,
    "one_cycle": OneCycle,
    "polynomial": Polynomial,
    "reduce_on_plateau": ReduceOnPlateau,
    "rex": REX,
    "step": StepDecay,
    "tanh": Tanh,
    "wsd": WSD,
}
_ALIASES = {  # names in transformers' get_scheduler and in timm
    "constant_with_warmup": "constant",
    "cosine_warmup_with_min_lr": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "multistep": "multi_step",
    "none": "constant",
    "plateau": "reduce_on_plateau",
    "poly": "polynomial",
    "reduce_lr_on_plateau": "reduce_on_plateau",
    "rsqrt": "inverse_sqrt",
    "warmup_stable_decay": "wsd",
}
_CLASS_NAMES = {"multi_step_decay": "multi_step", "step_decay": "step"}
"""Class names in snake case that differ from the names in the registry."""

SCHEDULES: Registry[Schedule] = Registry(
    "schedule", Schedule, {**_ALIASES, **_CLASS_NAMES}, group="lightning_optim.schedules"
)
"""Schedules by name; `lightning_optim.register` adds a user's own."""

for _name, _cls in _BUILT_IN.items():
    SCHEDULES.add(_cls, _name)


def list_schedules() -> list[str]:
    """Return the names of the schedules; `get_schedule` also accepts those of Hugging Face and timm."""
    return SCHEDULES.names()


def get_schedule(name: str) -> type[Schedule]:
    """Return the schedule class with a name of this package, of transformers' ``get_scheduler`` or of timm.

    Args:
        name: The name.

    Returns:
        The class.

    Raises:
        ValueError: The name is unknown; the message names the nearest.

    Example:
        >>> get_schedule("warmup_stable_decay").__name__
        'WSD'
    """
    return SCHEDULES.get(name)
