"""The two moment lines of Adam's family, one function for all rules: `rebind` follows helpers."""

from __future__ import annotations

from typing import Any


def update_moments(
    grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, one_minus_beta1: Any, beta2: Any, one_minus_beta2: Any
) -> Any:
    """Exponential moving averages of one element's gradient and of its square.

    Returns:
        The new ``exp_avg`` and ``exp_avg_sq``. The square is multiplied from the left, (1 − β₂)·g first, as in torch:
        the order decides the last bit.
    """
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    return exp_avg, update_second_moment(grad, exp_avg_sq, beta2, one_minus_beta2)


def update_second_moment(grad: Any, exp_avg_sq: Any, beta2: Any, one_minus_beta2: Any) -> Any:
    """Exponential moving average of the square of one element's gradient."""
    return beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
