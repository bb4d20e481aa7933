"""The optimizer layer for PyTorch Lightning.

Names are imported on first use (PEP 562), so that ``import lightning_optim.optim`` loads torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_optim._version import __version__
from lightning_optim.core.moved_modules import keep_old_paths

if TYPE_CHECKING:
    from lightning_optim import clipping as clipping
    from lightning_optim import diagnostics as diagnostics
    from lightning_optim import divergence as divergence
    from lightning_optim import optim as optim
    from lightning_optim import schedules as schedules
    from lightning_optim import testing as testing
    from lightning_optim.callbacks import ConfigureOptimizers as ConfigureOptimizers
    from lightning_optim.callbacks import DivergenceGuard as DivergenceGuard
    from lightning_optim.callbacks import GradientClipping as GradientClipping
    from lightning_optim.callbacks import GradientRelease as GradientRelease
    from lightning_optim.callbacks import OptimizerMonitor as OptimizerMonitor
    from lightning_optim.callbacks import RunSummary as RunSummary
    from lightning_optim.callbacks import ScheduleFree as ScheduleFree
    from lightning_optim.callbacks import WeightAverage as WeightAverage
    from lightning_optim.callbacks import WeightDecay as WeightDecay
    from lightning_optim.callbacks import attach as attach
    from lightning_optim.cli import OptimCLI as OptimCLI
    from lightning_optim.core.durations import Duration as Duration
    from lightning_optim.core.durations import Horizon as Horizon
    from lightning_optim.core.registry import register as register
    from lightning_optim.factory import OptimizerFactories as OptimizerFactories
    from lightning_optim.factory import OptimizerFactory as OptimizerFactory
    from lightning_optim.factory import PartOptimizer as PartOptimizer
    from lightning_optim.param_groups import LayerDecay as LayerDecay
    from lightning_optim.param_groups import ParamGroupRule as ParamGroupRule
    from lightning_optim.param_groups import WidthScaling as WidthScaling
    from lightning_optim.param_groups import build_param_groups as build_param_groups
    from lightning_optim.step import StepPipeline as StepPipeline
    from lightning_optim.step import release_gradients as release_gradients
    from lightning_optim.step.debug_step import debug_step as debug_step
    from lightning_optim.tuning.compare import compare as compare
    from lightning_optim.tuning.inspection import coordinate_check as coordinate_check
    from lightning_optim.tuning.inspection import inspect_model as inspect_model
    from lightning_optim.tuning.rates.find import find_lr as find_lr
    from lightning_optim.tuning.rates.range_test import LRRangeTest as LRRangeTest
    from lightning_optim.tuning.recipes import recipe as recipe
    from lightning_optim.tuning.recipes import recommend as recommend
    from lightning_optim.tuning.search.python_search import search as search

keep_old_paths()

_MODULES = (
    "callbacks",
    "cli",
    "clipping",
    "core",
    "diagnostics",
    "divergence",
    "factory",
    "kernels",
    "optim",
    "param_groups",
    "schedules",
    "step",
    "testing",
    "tuning",
)
_SHOWN = ("clipping", "diagnostics", "divergence", "optim", "schedules", "testing")
"""The modules whose names a user writes; `import *` and completion offer them."""
_NAMES = {
    "ConfigureOptimizers": "callbacks",
    "DivergenceGuard": "callbacks",
    "Duration": "core.durations",
    "GradientClipping": "callbacks",
    "GradientRelease": "callbacks",
    "Horizon": "core.durations",
    "LRRangeTest": "tuning.rates.range_test",
    "LayerDecay": "param_groups",
    "OptimCLI": "cli",
    "OptimizerFactories": "factory",
    "OptimizerFactory": "factory",
    "OptimizerMonitor": "callbacks",
    "ParamGroupRule": "param_groups",
    "PartOptimizer": "factory",
    "RunSummary": "callbacks",
    "ScheduleFree": "callbacks",
    "StepPipeline": "step",
    "WeightAverage": "callbacks",
    "WeightDecay": "callbacks",
    "WidthScaling": "param_groups",
    "attach": "callbacks",
    "build_param_groups": "param_groups",
    "coordinate_check": "tuning.inspection",
    "debug_step": "step.debug_step",
    "find_lr": "tuning.rates.find",
    "inspect_model": "tuning.inspection",
    "compare": "tuning.compare",
    "recipe": "tuning.recipes",
    "recommend": "tuning.recipes",
    "register": "core.registry",
    "release_gradients": "step",
    "search": "tuning.search.python_search",
}

__all__ = [
    "__version__",
    *_SHOWN,
    *_NAMES,
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_where(name)}")


def _where(name: str) -> str:
    """Return where a class is that has been looked for here, or what it may be, as the end of a sentence."""
    if not name[:1].isupper():
        return ""
    from lightning_optim.core.suggest import nearest

    for module in _SHOWN:
        if hasattr(importlib.import_module(f"{__name__}.{module}"), name):
            return f". Did you mean {f'{__name__}.{module}.{name}'!r}?"
    return f". {nearest(name, _NAMES)}"


def __dir__() -> list[str]:
    return sorted(__all__)
