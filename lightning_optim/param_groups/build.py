"""Construction of a torch optimizer's parameter groups from a model and a list of rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import checked
from lightning_optim.core.wrappers import unwrap_module
from lightning_optim.param_groups.parts import named_parameters
from lightning_optim.param_groups.rules import REST, ParamGroupRule
from lightning_optim.param_groups.scalings import LayerDecay, WidthScaling

Entry = ParamGroupRule | LayerDecay | WidthScaling | str
"""Types of the entries in a list of rules."""

_PRESETS = {"no_decay": ParamGroupRule(name="no_decay", part="undecayed", weight_decay=0.0)}


def list_presets() -> list[str]:
    """Return the names of presets, each of which can be given in place of a rule."""
    return sorted(_PRESETS)


def check_rules(rules: Sequence[Entry]) -> None:
    """Check a list of rules as far as that is possible without a model.

    Args:
        rules: Rules, scalings and names of presets.

    Raises:
        TypeError: The rules are not a list, or an entry is not a rule.
        ValueError: A preset is unknown, a name is used twice, or there are two scalings of one kind.
    """
    if isinstance(rules, str):
        raise TypeError(f"Invalid parameter group rules {rules!r}: must be a list, for instance [{rules!r}].")
    for rule in rules:
        if isinstance(rule, str):
            if rule not in _PRESETS:
                raise ValueError(f"Unknown parameter group preset {rule!r}. {nearest(rule, _PRESETS)}")
        elif not isinstance(rule, ParamGroupRule | LayerDecay | WidthScaling):
            raise TypeError(
                f"Invalid parameter group rule {rule!r}: must be a ParamGroupRule, a LayerDecay, a WidthScaling or the "
                f"name of a preset ({', '.join(_PRESETS)})."
            )
    for kind in (LayerDecay, WidthScaling):
        if len(twice := [rule for rule in rules if isinstance(rule, kind)]) > 1:
            raise ValueError(f"Two {kind.__name__} in one list: {twice[0]!r} and {twice[1]!r}. Remove one of them.")
    names = [rule if isinstance(rule, str) else rule.name for rule in rules if isinstance(rule, str | ParamGroupRule)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Duplicate parameter group name {duplicates[0]!r}: each of {names} must be unique.")


@checked
def build_param_groups(model: nn.Module, rules: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """Sort every trainable parameter of ``model`` into exactly one group.

    Frozen parameters are in no group, unless a rule sets ``frozen_until``; tied weights are in one group once.
    Parameters that no rule takes form the last group, ``"default"``.

    Args:
        model: The model; its names are those of ``model.named_parameters()``, without what Fabric puts before them.
        rules: Ordered rules or names of presets (`list_presets`); the first match wins. A `LayerDecay` or
            `WidthScaling` at any position splits the groups further.

    Returns:
        Groups for a torch optimizer: ``params`` as (name, parameter) pairs, from which torch makes ``param_names``,
        ``name``, ``lr_multiplier`` (`OptimizerFactory` applies it), and the settings of the rules. There are no empty
        groups.

    Raises:
        ValueError: No parameter is trainable, two rules have the same name, a preset is unknown, or rules match
            nothing; the message names all of these. A preset may match nothing, because it is not specific to a model.
    """
    check_rules(rules)
    model = unwrap_module(model)
    scalings = [rule for rule in rules if isinstance(rule, LayerDecay | WidthScaling)]
    given = [rule for rule in rules if isinstance(rule, str | ParamGroupRule)]
    resolved = resolve_rules(rules)
    parameters = list(named_parameters(model))
    scales = [scaling.scales(model, parameters) for scaling in scalings]
    groups: dict[Any, dict[str, Any]] = {}
    used: set[int] = set()
    for parameter in parameters:
        taken = [index for index, rule in enumerate(resolved) if rule.matches(parameter)]
        takers = [index for index in taken if not resolved[index].overlay]
        # The order of the list is kept, because the first rule that has a setting decides it.
        at_work = [index for index in taken if resolved[index].overlay or index == takers[0]]
        settings = settings_of([resolved[index] for index in at_work])
        if not parameter.parameter.requires_grad and "frozen_until" not in settings:
            continue
        used.update(at_work)
        # Groups are sorted by their rules, the rest last; an overlay's part of a group follows the group itself.
        overlays = [index for index in at_work if resolved[index].overlay]
        cuts = [scale[parameter.name] for scale in scales]
        key = (takers[0] if takers else len(resolved), tuple(overlays), tuple(cuts))
        if key not in groups:
            labels = [cut.label for cut in cuts if cut.label]
            names = [*labels, *(resolved[index].name for index in (*overlays, *takers[:1]))]
            settings["lr_multiplier"] *= math.prod(cut.lr_multiplier for cut in cuts)
            groups[key] = {"params": [], "name": "_".join(names) or REST, **settings}
        groups[key]["params"].append((parameter.name, parameter.parameter))
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: it has {len(parameters)}, "
            f"{'all of them frozen (requires_grad=False)' if parameters else 'so there is nothing to optimize'}."
        )
    problems = [
        rule.why_nothing(resolved, parameters)
        for index, rule in enumerate(resolved)
        if index not in used and isinstance(given[index], ParamGroupRule)
    ]
    names = [group["name"] for group in groups.values()]
    problems += [
        f"Two groups would be called {name!r}: that of the rule, and one whose name joins overlays. Rename a rule."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return [groups[key] for key in sorted(groups)]


def resolve_rules(rules: Sequence[Entry]) -> list[ParamGroupRule]:
    """Return the rules among the entries, in order, presets included and scalings left out."""
    given = [rule for rule in rules if isinstance(rule, str | ParamGroupRule)]
    return [_PRESETS[rule] if isinstance(rule, str) else rule for rule in given]


def settings_of(rules: Sequence[ParamGroupRule]) -> dict[str, Any]:
    """Return the settings of a group of these rules: the first that has a setting decides, and multipliers multiply."""
    settings: dict[str, Any] = {"lr_multiplier": 1.0}
    for rule in rules:
        settings = rule.settings() | settings
        if rule.schedule is not None:
            settings.setdefault("schedule", rule.schedule)
        settings["lr_multiplier"] *= rule.lr_multiplier
    return settings
