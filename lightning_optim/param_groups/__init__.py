"""Parameter groups from ordered rules: the first rule that matches a parameter takes it."""

from lightning_optim.param_groups.build import Entry, build_param_groups, check_rules, list_presets
from lightning_optim.param_groups.depth import parameter_depths
from lightning_optim.param_groups.losses import lost_matches
from lightning_optim.param_groups.parts import (
    NamedParameter,
    is_hidden_matrix,
    list_parts,
    named_parameters,
    why_not_hidden,
)
from lightning_optim.param_groups.rules import REST, ParamGroupRule
from lightning_optim.param_groups.scalings import LayerDecay, WidthScaling, shapes_of

__all__ = [
    "REST",
    "Entry",
    "LayerDecay",
    "NamedParameter",
    "ParamGroupRule",
    "WidthScaling",
    "build_param_groups",
    "check_rules",
    "is_hidden_matrix",
    "list_parts",
    "list_presets",
    "lost_matches",
    "named_parameters",
    "parameter_depths",
    "shapes_of",
    "why_not_hidden",
]
