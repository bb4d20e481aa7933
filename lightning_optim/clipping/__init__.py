"""Clip rules: from one read of the gradients to what they are divided by, on the device."""

from lightning_optim.clipping.base import Clamp, Clip, ClipRule, Divisor, UnitDivisor
from lightning_optim.clipping.choice import get_clip_rule, list_clip_rules, make_clip_rule
from lightning_optim.clipping.limits import BlockRMS, GlobalNorm, GroupNorm, Value
from lightning_optim.clipping.state import Clipper

__all__ = [
    "BlockRMS",
    "Clamp",
    "Clip",
    "ClipRule",
    "Clipper",
    "Divisor",
    "GlobalNorm",
    "GroupNorm",
    "UnitDivisor",
    "Value",
    "get_clip_rule",
    "list_clip_rules",
    "make_clip_rule",
]
