"""Statistics of one update, defined once for all backends: each is a sum of products x·y over the elements.

Each statistic is a function of one element that returns the two factors (x, y); a count returns 1 or 0 twice. Like a
rule it is plain arithmetic over the named functions, and each backend rebinds it (`rules.rebind`). It returns factors
instead of their product, because a backend may fuse this product with the addition to the total, and with nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.rules import Rule, maximum, sqrt, where
from lightning_optim.kernels.weight_decay import DECAY_TERM

# The arguments have the same meaning in all functions:
#   param, after            the weight before and after the step, as stored
#   grad                    the gradient after division, without its L2 term
#   first_moment            m before the step
#   second_moment           v after the step
#   decay_term              the value of `weight_decay.DECAY_TERM`, or the weight
#   bias_correction2_sqrt, eps            scalars of the tensor
#   zero, one, tiny         constants, in the dtype of the arithmetic


def _root(second_moment: Any, bias_correction2_sqrt: Any) -> Any:
    return sqrt(second_moment) / bias_correction2_sqrt


def param_sq(param: Any) -> Any:
    """Σ p²."""
    return param, param


def update_sq(param: Any, after: Any) -> Any:
    """Σ Δp²."""
    moved = after - param
    return moved, moved


def grad_exp_avg(grad: Any, first_moment: Any) -> Any:
    """Σ g·m."""
    return grad, first_moment


def momentum_sq(first_moment: Any) -> Any:
    """Σ m²."""
    return first_moment, first_moment


def grad_sq_over_exp_avg_sq(grad: Any, second_moment: Any, bias_correction2_sqrt: Any, tiny: Any) -> Any:
    """Σ g²/v̂. Where v̂ is 0 the gradient has always been 0, and the term is 0 rather than 0/0."""
    ratio = grad / maximum(_root(second_moment, bias_correction2_sqrt), tiny)
    return ratio, ratio


def below_eps(second_moment: Any, bias_correction2_sqrt: Any, eps: Any, zero: Any, one: Any) -> Any:
    """Count of √v̂ < eps."""
    flag = where(_root(second_moment, bias_correction2_sqrt) < eps, one, zero)
    return flag, flag


def zero_grad(grad: Any, zero: Any, one: Any) -> Any:
    """Count of g = 0."""
    flag = where(grad == zero, one, zero)
    return flag, flag


def decay_sq(decay_term: Any) -> Any:
    """Σ of the squared decay term, to be multiplied by the square of `weight_decay.decay_factor`."""
    return decay_term, decay_term


FACTORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        param_sq,
        update_sq,
        grad_exp_avg,
        momentum_sq,
        grad_sq_over_exp_avg_sq,
        below_eps,
        zero_grad,
        decay_sq,
    )
}
"""Functions by name, one for each of `STEP_SUMS`."""

TINY = 1e-18
"""Smallest √v̂ that a gradient is divided by: positive, and far below any `eps`."""


@cache
def arguments(name: str) -> tuple[str, ...]:
    """Return the names of the arguments of the function called ``name``, in order."""
    return tuple(inspect.signature(FACTORS[name]).parameters)


def collected(rule: Rule | type[Rule]) -> tuple[str, ...]:
    """Return the names of the step sums that are defined for ``rule``, in the order of `STEP_SUMS`."""
    missing = {"first_moment"} if rule.first_moment is None else set()
    missing |= {"second_moment"} if rule.second_moment is None else set()
    missing |= set() if rule.decays_beside else {"decay_term"}
    return tuple(name for name in STEP_SUMS if missing.isdisjoint(arguments(name)))


def collected_by_kernel(rule: type[Rule], decay_form: str) -> tuple[str, ...]:
    """Return `collected` without `decay_sq` where it equals `param_sq`, which is collected in any case."""
    return tuple(name for name in collected(rule) if name != "decay_sq" or decay_form in DECAY_TERM)
