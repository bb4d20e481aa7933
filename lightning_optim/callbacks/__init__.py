"""Lightning callbacks: they translate hooks into calls on the parts below, and are all that imports Lightning."""

from lightning_optim.callbacks.configure_optimizers import ConfigureOptimizers, attach
from lightning_optim.callbacks.divergence_guard import DivergenceGuard
from lightning_optim.callbacks.gradient_clipping import GradientClipping
from lightning_optim.callbacks.gradient_release import GradientRelease
from lightning_optim.callbacks.optimizer_monitor import OptimizerMonitor
from lightning_optim.callbacks.run_summary import RunSummary
from lightning_optim.callbacks.schedule_free import ScheduleFree
from lightning_optim.callbacks.weight_average import WeightAverage
from lightning_optim.callbacks.weight_decay import WeightDecay

__all__ = [
    "ConfigureOptimizers",
    "DivergenceGuard",
    "GradientClipping",
    "GradientRelease",
    "OptimizerMonitor",
    "RunSummary",
    "ScheduleFree",
    "WeightAverage",
    "WeightDecay",
    "attach",
]
