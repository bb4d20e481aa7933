"""Schedules: pure functions from the optimizer step to a multiplier, and the scheduler that applies one.

A schedule never sees an optimizer. It is the multiplier of the peak learning rate at a step, so it can be
plotted, tested and composed; `Scheduler` multiplies each group's own peak, which keeps the groups' ratios.
"""

from __future__ import annotations

from lightning_optim.schedules.base import Phases, Position, Schedule
from lightning_optim.schedules.compositions import WSD, OneCycle
from lightning_optim.schedules.function import FromFunction
from lightning_optim.schedules.phases import Cooldown, Warmup
from lightning_optim.schedules.plateau import ReduceOnPlateau
from lightning_optim.schedules.registry import SCHEDULES, get_schedule, list_schedules
from lightning_optim.schedules.restarts import CosineRestarts
from lightning_optim.schedules.scheduler import Scheduler
from lightning_optim.schedules.shapes import REX, Constant, Cosine, Exponential, InverseSqrt, Linear, Polynomial, Tanh
from lightning_optim.schedules.stepped import MultiStep, MultiStepDecay, Step, StepDecay

__all__ = [
    "REX",
    "WSD",
    "Constant",
    "Cooldown",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "FromFunction",
    "InverseSqrt",
    "Linear",
    "MultiStep",
    "MultiStepDecay",
    "OneCycle",
    "Phases",
    "Polynomial",
    "Position",
    "ReduceOnPlateau",
    "Schedule",
    "Scheduler",
    "Step",
    "StepDecay",
    "Tanh",
    "Warmup",
    "get_schedule",
    "list_schedules",
    "register",
]

register = SCHEDULES.register
"""[`lightning_optim.register`][] for schedules alone. An installed package brings its own as entry points of the
group `lightning_optim.schedules`."""
