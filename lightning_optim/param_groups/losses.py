"""Rules that match parameters which an earlier rule has taken: legal, as the first match wins, and seldom meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_optim.core.wrappers import unwrap_module
from lightning_optim.param_groups.build import Entry, resolve_rules, settings_of
from lightning_optim.param_groups.parts import named_parameters
from lightning_optim.param_groups.rules import ParamGroupRule

_SHOWN = 5


def lost_matches(model: nn.Module, rules: Sequence[Entry]) -> list[str]:
    """Name the parameters that a rule matches and does not get, where that makes a difference to them.

    Args:
        model: The model.
        rules: Rules that `build_param_groups` accepts for it: one that gets nothing at all is an error there.

    Returns:
        A sentence for each pair of rules.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        >>> body = ParamGroupRule(name="body", pattern="^body", lr_multiplier=0.1)
        >>> print(*lost_matches(model, ["no_decay", body]))
        Parameter group rule 'body' matches 'body.bias', which the earlier rule 'no_decay' has taken: ...
    """
    resolved = resolve_rules(rules)
    if sum(not rule.overlay for rule in resolved) < 2:
        return []
    lost: dict[tuple[int, int], list[str]] = {}
    missed: dict[tuple[int, int], dict[str, Any]] = {}
    for parameter in named_parameters(unwrap_module(model)):
        matching = [index for index, rule in enumerate(resolved) if rule.matches(parameter)]
        takers = [index for index in matching if not resolved[index].overlay]
        at_work = [index for index in matching if resolved[index].overlay or index == takers[0]]
        settings = settings_of([resolved[index] for index in at_work])
        for loser in takers[1:]:
            differing = dict(_differing(resolved[loser], settings))
            if differing and (parameter.parameter.requires_grad or "frozen_until" in settings | differing):
                lost.setdefault((loser, takers[0]), []).append(parameter.name)
                missed.setdefault((loser, takers[0]), {}).update(differing)
    return [
        f"Parameter group rule {resolved[loser].name!r} matches {_listed(names)}, which the earlier rule "
        f"{resolved[winner].name!r} has taken: {', '.join(f'{k}={v!r}' for k, v in missed[loser, winner].items())} "
        f"would be for {'it' if len(names) == 1 else 'them'}, and is not. If it should be, move "
        f"{resolved[loser].name!r} up, or make one of the two an `overlay`, which takes nothing and cuts groups."
        for (loser, winner), names in sorted(lost.items())
    ]


def _differing(rule: ParamGroupRule, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the rule sets and the group has otherwise."""
    wanted = rule.settings()
    if rule.schedule is not None:
        wanted["schedule"] = rule.schedule
    if rule.lr_multiplier != 1:
        wanted["lr_multiplier"] = rule.lr_multiplier
    for key, value in wanted.items():
        if key not in settings or settings[key] != value:
            yield key, value


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
