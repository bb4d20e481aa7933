"""A fair comparison of variants of a run: same weights and data per seed, own rates, a verdict that knows noise."""

from lightning_optim.tuning.compare.from_python import compare
from lightning_optim.tuning.compare.outcome import Comparison

__all__ = ["Comparison", "compare"]
