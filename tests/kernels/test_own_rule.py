"""What is refused when a rule is defined, on every backend alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightning_optim as lo
from lightning_optim.kernels.rules import UpdateRule, absolute, where


def tenth(x: Any) -> Any:
    return 0.1 * x


def size(x: Any) -> Any:
    return absolute(x)


def around(number: float) -> Any:
    def update(param: Any, grad: Any, exp_avg: Any, lr: Any) -> Any:
        return lr * number * grad, exp_avg

    return update


class Functions:
    """Wrong functions by the words of their refusal."""

    def literal(param, grad, exp_avg, lr):
        return lr * (0.9 * exp_avg + grad), exp_avg

    def whole_number(param, grad, exp_avg, lr):
        return lr * grad / (exp_avg + 1), exp_avg

    def in_a_helper(param, grad, exp_avg, lr):
        return lr * tenth(grad), exp_avg

    def swapped(grad, param, exp_avg, lr):
        return lr * grad, exp_avg

    def state_last(param, grad, lr, exp_avg):
        return lr * grad, exp_avg

    def too_few(param, grad):
        return grad, grad

    def default(param, grad, exp_avg, lr, k=None):
        return lr * grad, exp_avg

    def no_state(param, grad, exp_avg, lr):
        return lr * grad

    def more_state(param, grad, exp_avg, lr):
        return lr * grad, exp_avg, exp_avg


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (Functions.literal, "has the literal 0.9.*Return it from `scalars`"),
        (Functions.whole_number, "has the literal 1,"),
        (Functions.in_a_helper, "has the literal 0.1,"),
        (Functions.swapped, r"takes \(grad, param, exp_avg, lr\), but must begin with \(param, grad, exp_avg\)"),
        (Functions.state_last, r"must begin with \(param, grad, exp_avg\)"),
        (Functions.too_few, r"must begin with \(param, grad, exp_avg\)"),
        (Functions.default, "has 'k' with a default"),
        (Functions.no_state, "returns one value, but must return a tuple of 2: the amount to subtract, exp_avg"),
        (Functions.more_state, "returns 3 values"),
        (around(0.5), "uses 'number' of the function around it"),
        (7, "must be a static method"),
    ],
)
def test_a_wrong_update_is_refused_with_the_class(function: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"Own.update.*{told}|Own.update {told}"):
        type(
            "Own",
            (UpdateRule,),
            {"state": ("exp_avg",), "update": staticmethod(function) if callable(function) else function},
        )


def test_terms_of_sums_are_held_to_the_same() -> None:
    def terms(param, grad, lr):
        return (2 * grad,)

    with pytest.raises(TypeError, match=r"Own.sums_update has the literal 2,"):
        type("Own", (UpdateRule,), {"sums": ("total",), "sums_update": staticmethod(terms)})


def test_helpers_and_named_functions_are_none() -> None:
    def update(param, grad, exp_avg, lr):
        return lr * where(size(grad) > lr, grad, exp_avg), grad

    type("Own", (UpdateRule,), {"state": ("exp_avg",), "update": staticmethod(update)})


class Plain(UpdateRule):
    counts_steps = False

    def scalars(self, group: Any, step: Any, **scalar_state: Any) -> dict[str, Any]:
        return {"lr": group["lr"], "factor": 1.0}

    @staticmethod
    def update(param, grad, lr, factr):
        return (lr * factr * grad,)


class Steps(lo.optim.FusedOptimizer):
    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    @classmethod
    def rule(cls, group: Any) -> Any:
        return Plain()


class Right(Steps):
    @classmethod
    def rule(cls, group: Any) -> Any:
        return Renamed()


class Renamed(Plain):
    @staticmethod
    def update(param, grad, lr, factor):
        return (lr * factor * grad,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_scalar_that_is_not_given_is_named(backend: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Steps([weight], backend=backend)
    weight.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"takes 'factr', which its `scalars` does not return\. Did you mean 'factor'"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_optimizer_without_weight_decay_has_none(backend: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Right([weight], backend=backend)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3,), 0.9))
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_an_optimizer_without_a_rate_is_refused() -> None:
    class NoRate(lo.optim.FusedOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    with pytest.raises(TypeError, match="NoRate gives no default for 'lr'"):
        NoRate([torch.nn.Parameter(torch.ones(3))])
