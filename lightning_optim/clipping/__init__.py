"""Clip rules: from one read of the gradients to what they are divided by, on the device."""

from lightning_optim.clipping.adagc import AdaGC
from lightning_optim.clipping.agc import AGC
from lightning_optim.clipping.base import Clamp, Clip, ClipRule, Divisor, UnitDivisor
from lightning_optim.clipping.choice import CLIP_RULES, get_clip_rule, list_clip_rules, make_clip_rule
from lightning_optim.clipping.history import AutoClip, ZClip
from lightning_optim.clipping.limits import BlockRMS, GlobalNorm, GroupNorm, Value
from lightning_optim.clipping.moments import MomentumRatio, UpdateRMS
from lightning_optim.clipping.state import Clipper

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "BlockRMS",
    "Clamp",
    "Clip",
    "ClipRule",
    "Clipper",
    "Divisor",
    "GlobalNorm",
    "GroupNorm",
    "MomentumRatio",
    "UnitDivisor",
    "UpdateRMS",
    "Value",
    "ZClip",
    "get_clip_rule",
    "list_clip_rules",
    "make_clip_rule",
    "register",
]

register = CLIP_RULES.register
"""[`lightning_optim.register`][] for clip rules alone. An installed package brings its own as entry points of the group
`lightning_optim.clip_rules`."""
