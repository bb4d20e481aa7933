"""Moment updates of the Adam family, shared by all its rules, because `rebind` follows helper functions."""

from __future__ import annotations

from typing import Any


def update_moments(
    grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, one_minus_beta1: Any, beta2: Any, one_minus_beta2: Any
) -> Any:
    """Update the exponential moving averages of one element's gradient and of its square.

    Returns:
        The new ``exp_avg`` and ``exp_avg_sq``. The product of the square starts with (1 − β₂)·g, as in torch, because
        the order of operations determines the last bit.
    """
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    return exp_avg, update_second_moment(grad, exp_avg_sq, beta2, one_minus_beta2)


def update_second_moment(grad: Any, exp_avg_sq: Any, beta2: Any, one_minus_beta2: Any) -> Any:
    """Update the exponential moving average of the square of one element's gradient."""
    return beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
