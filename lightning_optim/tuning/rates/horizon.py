"""From the best learning rate of a short training to that of a longer one."""

from __future__ import annotations

__all__ = ["EXPONENT", "exponent_of", "horizon_factor"]

EXPONENT = 0.32
"""The best rate falls with the length of a run as length ** -0.32: Bjorck et al., Scaling Optimal LR Across Token
Horizons, 2025, https://arxiv.org/abs/2409.19913. Our own trials of SGD, AdamW and Muon agree (docs/benchmarks.md)."""

_EXPONENTS = {
    # Lion moves each weight by the rate in each step, however small the gradients have become: what matters is how far
    # it gets, which is rate * steps.
    "lion": 1.0,
    # Without bias correction the first updates are several times as long as later ones, which costs a short training
    # more: the rate that is best for it is too low rather than too high.
    "rmsprop": 0.0,
}
"""Measured in docs/benchmarks.md, from trainings of 50 and 100 steps to 200; by the optimizer's class."""

_MEASURED = 4.0
"""Ratio of lengths over which an exponent of its own was measured; what is beyond has the published one."""


def exponent_of(optimizer: type | None) -> float:
    """Return the exponent by which the best rate of an optimizer falls with the length of a run.

    Args:
        optimizer: Its class; None or one that is not known for the published exponent. Classes of other libraries with
            the same name count as the same.
    """
    names = [cls.__name__.lower() for cls in (optimizer.__mro__ if optimizer is not None else ())]
    return next((_EXPONENTS[name] for name in names if name in _EXPONENTS), EXPONENT)


def horizon_factor(steps: float, total_steps: float | None, optimizer: type | None = None) -> float:
    """Return the factor from the best rate of a short training to that of a longer one, in (0, 1].

    Args:
        steps: Steps of the short training.
        total_steps: Steps of the long one; None or fewer than ``steps`` for no change.
        optimizer: Class of the optimizer.

    Example:
        >>> round(horizon_factor(100, 10_000), 3)
        0.229
    """
    if total_steps is None or total_steps <= steps:
        return 1.0
    ratio = total_steps / steps
    near = min(ratio, _MEASURED)
    return float(near ** -exponent_of(optimizer) * (ratio / near) ** -EXPONENT)
