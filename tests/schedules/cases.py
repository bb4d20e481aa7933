"""One row per schedule: how it is written, and its multiplier by arithmetic that shares nothing with the package.

``t`` is steps since the warmup, ``n`` how many of them there are; every row has the warmup WARMUP.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sqrt, tanh
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_optim import schedules as s

WARMUP = 4


class Case(NamedTuple):
    name: str
    schedule: s.Schedule
    after_warmup: Callable[[int, int], float]
    """(t, n) → multiplier, for t up to n; beyond, bounded schedules stay."""
    bounded: bool = True

    def expected(self, step: int, total: int) -> float:
        if step < WARMUP:
            return self.warmup(step)
        n = total - WARMUP
        t = step - WARMUP
        return self.after_warmup(min(t, n) if self.bounded else t, n)

    def warmup(self, step: int) -> float:
        if isinstance(self.schedule, s.OneCycle):
            return 1 / 25 + (1 - 1 / 25) * (1 - cos(pi * step / WARMUP)) / 2
        return (step + 1) / WARMUP


def _restarts(t: int, n: int) -> float:
    # three cycles of n/7, 2n/7 and 4n/7, with peaks 1, 0.5 and 0.25
    x = 7 * t / n
    begin, length, peak = (0, 1, 1) if x < 1 else (1, 2, 0.5) if x < 3 else (3, 4, 0.25)
    return 0.1 + (peak - 0.1) * (1 + cos(pi * (x - begin) / length)) / 2


def _wsd(decay: Callable[[float], float], final: float) -> Callable[[int, int], float]:
    # the last 6 steps
    return lambda t, n: 1 if t <= n - 6 else final + (1 - final) * decay((t - (n - 6)) / 6)


def cosine(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """Multiplier of half a cosine after a linear warmup."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 + cos(pi * (min(step, total) - warmup) / (total - warmup))) / 2


def optimizer_of(*rates: float, **options: Any) -> torch.optim.SGD:
    """One group for each rate, with one number to train."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=1.0, **options)


CASES = [
    Case("constant", s.Constant(WARMUP), lambda t, n: 1),
    Case("linear", s.Linear(WARMUP, final=0.1), lambda t, n: 1 - 0.9 * t / n),
    Case("cosine", s.Cosine(WARMUP, final=0.1), lambda t, n: 0.1 + 0.9 * (1 + cos(pi * t / n)) / 2),
    Case("polynomial", s.Polynomial(WARMUP, power=2, final=0.1), lambda t, n: 0.1 + 0.9 * ((n - t) / n) ** 2),
    Case("exponential", s.Exponential(WARMUP, final=0.01), lambda t, n: 0.01 ** (t / n)),
    Case("rex", s.REX(WARMUP), lambda t, n: (n - t) / (0.5 * n + 0.5 * (n - t))),
    Case("tanh", s.Tanh(WARMUP, final=0.1), lambda t, n: 0.1 + 0.45 * (1 - tanh(10 * t / n - 7)) * (t < n)),
    Case("inverse_sqrt", s.InverseSqrt(WARMUP), lambda t, n: sqrt(WARMUP / (t + WARMUP)), bounded=False),
    Case("step", s.StepDecay(WARMUP, every=5, factor=0.5), lambda t, n: 0.5 ** (t // 5), bounded=False),
    Case(
        "multi_step",
        s.MultiStepDecay(WARMUP, milestones=[6, 9], factor=0.5),
        lambda t, n: 1 if t + WARMUP < 6 else 0.5 if t + WARMUP < 9 else 0.25,
        bounded=False,
    ),
    Case("reduce_on_plateau", s.ReduceOnPlateau(WARMUP), lambda t, n: 1),
    Case("one_cycle", s.OneCycle(f"{WARMUP} steps"), lambda t, n: 4e-6 + (1 - 4e-6) * (1 + cos(pi * t / n)) / 2),
    Case(
        "cosine_restarts",
        s.CosineRestarts(WARMUP, cycles=3, length_multiplier=2, peak_multiplier=0.5, final=0.1),
        _restarts,
    ),
    Case("wsd", s.WSD(WARMUP, cooldown="6 steps"), _wsd(lambda p: 1 - sqrt(p), 0)),
    Case("wsd-linear", s.WSD(WARMUP, cooldown=s.Cooldown(6, "linear", final=0.2)), _wsd(lambda p: 1 - p, 0.2)),
    Case("wsd-cosine", s.WSD(WARMUP, cooldown=s.Cooldown(6, "cosine")), _wsd(lambda p: (1 + cos(pi * p)) / 2, 0)),
]
