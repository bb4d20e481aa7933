"""From a model and a configuration to parameter groups, an optimizer and its schedule."""

from lightning_optim.factory.factory import OptimizerFactory

__all__ = ["OptimizerFactory"]
