"""Registry of clip rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_optim.clipping.adagc import AdaGC
from lightning_optim.clipping.agc import AGC
from lightning_optim.clipping.base import ClipRule
from lightning_optim.clipping.history import AutoClip, ZClip
from lightning_optim.clipping.limits import BlockRMS, GlobalNorm, GroupNorm, Value
from lightning_optim.clipping.moments import MomentumRatio, UpdateRMS
from lightning_optim.core.registry import Registry

_BUILT_IN: dict[str, type[ClipRule]] = {
    "adagc": AdaGC,
    "agc": AGC,
    "autoclip": AutoClip,
    "block_rms": BlockRMS,
    "global_norm": GlobalNorm,
    "group_norm": GroupNorm,
    "momentum_ratio": MomentumRatio,
    "update_rms": UpdateRMS,
    "value": Value,
    "zclip": ZClip,
}


CLIP_RULES: Registry[ClipRule] = Registry("clipping method", ClipRule, group="lightning_optim.clip_rules")
"""Clip rules by name; `lightning_optim.register` adds rules of users."""

for _name, _cls in _BUILT_IN.items():
    CLIP_RULES.add(_cls, _name)


def list_clip_rules() -> list[str]:
    """Return the names of all registered clip rules, sorted."""
    return CLIP_RULES.names()


def get_clip_rule(name: str) -> type[ClipRule]:
    """Return the rule class called ``name``.

    Raises:
        ValueError: No rule has that name; the message suggests the nearest one.
    """
    return CLIP_RULES.get(name)


def make_clip_rule(name: str, arguments: Mapping[str, Any]) -> ClipRule:
    """Create the rule called ``name`` with these arguments.

    Raises:
        ValueError: The name or an argument is unknown; the message suggests the nearest one.

    Example:
        >>> make_clip_rule("value", {"max_value": 0.5})
        Value(max_value=0.5)
    """
    return CLIP_RULES.make(name, arguments)
