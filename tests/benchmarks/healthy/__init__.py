"""A corpus of healthy runs: small real trainings in which a guard has nothing to do.

`run` trains one of `KINDS`, with a guard or without; ``python -m tests.benchmarks.healthy`` prints a table of all.
Limits and rules may be tuned on `TUNING`; figures that are published are of `HELD_OUT`, on which nothing was tuned.

Example:
    ``run("GAN, hinge", seed=0, guard=lo.DivergenceGuard()).rollbacks``
"""

from __future__ import annotations

from tests.benchmarks.healthy.base import Healthy
from tests.benchmarks.healthy.runs import KINDS, Outcome, no_guard, run, run_all

__all__ = ["HELD_OUT", "KINDS", "TUNING", "Healthy", "Outcome", "no_guard", "run", "run_all"]

TUNING = (0, 1, 2, 3, 4)
HELD_OUT = (100, 101, 102, 103, 104)
