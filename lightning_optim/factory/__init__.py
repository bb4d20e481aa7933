"""From a model and a configuration to parameter groups, an optimizer and its schedule."""

from lightning_optim.factory.factory import OptimizerFactory
from lightning_optim.factory.parts import OptimizerFactories, PartOptimizer

__all__ = ["OptimizerFactories", "OptimizerFactory", "PartOptimizer"]
