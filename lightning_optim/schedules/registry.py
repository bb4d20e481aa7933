"""Schedules by name: ours, and the names that Hugging Face and timm have for them."""

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
"""Names of classes that are not those of the registry."""

SCHEDULES: Registry[Schedule] = Registry("schedule", Schedule, {**_ALIASES, **_CLASS_NAMES})
"""Schedules by name; `lightning_optim.register` adds a user's own."""

for _name, _cls in _BUILT_IN.items():
    SCHEDULES.add(_cls, _name)


def list_schedules() -> list[str]:
    """Return the names of the schedules; `get_schedule` also knows those of Hugging Face and timm."""
    return SCHEDULES.names()


def get_schedule(name: str) -> type[Schedule]:
    """Return the schedule class called ``name`` here, in transformers' ``get_scheduler`` or in timm.

    Raises:
        ValueError: There is none; the message names the nearest.

    Example:
        >>> get_schedule("warmup_stable_decay").__name__
        'WSD'
    """
    return SCHEDULES.get(name)
