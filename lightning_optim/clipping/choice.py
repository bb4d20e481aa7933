"""Clip rules by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_optim.clipping.adagc import AdaGC
from lightning_optim.clipping.agc import AGC
from lightning_optim.clipping.base import ClipRule
from lightning_optim.clipping.history import AutoClip, ZClip
from lightning_optim.clipping.limits import BlockRMS, GlobalNorm, GroupNorm, Value
from lightning_optim.clipping.moments import MomentumRatio, UpdateRMS
from lightning_optim.core.suggest import nearest

_RULES: dict[str, type[ClipRule]] = {
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


def list_clip_rules() -> list[str]:
    """The names that `get_clip_rule` knows."""
    return sorted(_RULES)


def get_clip_rule(name: str) -> type[ClipRule]:
    """The rule class called ``name``.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    key = name.lower().replace("-", "_")
    if key not in _RULES:
        raise ValueError(f"Unknown clipping method {name!r}. {nearest(name, _RULES)}")
    return _RULES[key]


def make_clip_rule(name: str, arguments: Mapping[str, Any]) -> ClipRule:
    """The rule called ``name`` with these arguments.

    Raises:
        ValueError: The name is unknown, or the rule has no such argument; the message names the nearest.

    Example:
        >>> make_clip_rule("value", {"max_value": 0.5})
        Value(max_value=0.5)
    """
    rule = get_clip_rule(name)
    known = list(inspect.signature(rule).parameters)
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"Clipping method {name!r} takes no {argument!r}. {nearest(argument, known)}")
    return rule(**arguments)
