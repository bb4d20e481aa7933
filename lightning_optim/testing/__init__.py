"""A conformance kit: does an optimizer keep what torch, trainers and checkpoints rely on?"""

from lightning_optim.testing.check import Check, Result
from lightning_optim.testing.report import ConformanceError, Report
from lightning_optim.testing.run import check_optimizer, checks

__all__ = ["Check", "ConformanceError", "Report", "Result", "check_optimizer", "checks"]
