"""Diagnostics: named quantities of one step, computed on the device from its record, per parameter group or in all."""

from lightning_optim.core.registry import Registry, snake_case
from lightning_optim.diagnostics.base import Diagnostic
from lightning_optim.diagnostics.gradients import (
    BelowEps,
    ClipCoefficient,
    ClippedGradNorm,
    GradCosine,
    GradNorm,
    GradOverSecondMoment,
    NonFinite,
    ZeroGrad,
)
from lightning_optim.diagnostics.magnitudes import Histograms
from lightning_optim.diagnostics.report import StepReport
from lightning_optim.diagnostics.tensors import PerTensor
from lightning_optim.diagnostics.updates import (
    EffectiveLR,
    ParamNorm,
    ParamRMS,
    UpdateNorm,
    UpdateRatio,
    WeightDecayShare,
)

__all__ = [
    "DEFAULT_DIAGNOSTICS",
    "DIAGNOSTICS",
    "BelowEps",
    "ClipCoefficient",
    "ClippedGradNorm",
    "Diagnostic",
    "EffectiveLR",
    "GradCosine",
    "GradNorm",
    "GradOverSecondMoment",
    "Histograms",
    "NonFinite",
    "ParamNorm",
    "ParamRMS",
    "PerTensor",
    "Report",
    "StepReport",
    "UpdateNorm",
    "UpdateRatio",
    "WeightDecayShare",
    "ZeroGrad",
    "register",
]

Report = StepReport
"""Former name of `StepReport`, used up to version 0.1. Remove in 0.2."""

DEFAULT_DIAGNOSTICS: tuple[Diagnostic, ...] = (
    GradNorm(),
    ClippedGradNorm(),
    ClipCoefficient(),
    NonFinite(),
    ZeroGrad(),
    GradCosine(),
    GradOverSecondMoment(),
    BelowEps(),
    ParamNorm(),
    ParamRMS(),
    UpdateNorm(),
    UpdateRatio(),
    EffectiveLR(),
    WeightDecayShare(),
)

DIAGNOSTICS: Registry[Diagnostic] = Registry("diagnostic", Diagnostic, group="lightning_optim.diagnostics")
"""Diagnostics by name; `lightning_optim.register` adds a user's own."""

for _built_in in map(type, DEFAULT_DIAGNOSTICS):
    DIAGNOSTICS.add(_built_in, snake_case(_built_in.__name__))

register = DIAGNOSTICS.register
"""[`lightning_optim.register`][] for diagnostics alone. An installed package brings its own as entry points of the
group `lightning_optim.diagnostics`."""
