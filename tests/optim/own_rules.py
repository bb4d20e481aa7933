"""An optimizer and a kind of weight decay as a user writes them, in a module outside of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import lightning_optim as lo
from lightning_optim.kernels.rules import UpdateRule, absolute, maximum, sign, sqrt, where


def blended(old: Any, new: Any, keep: Any, take: Any) -> Any:
    return keep * old + take * new


class TamedRule(UpdateRule):
    """A sign of a momentum, tamed where the second moment is large; every named function and a helper occur."""

    state = ("exp_avg", "exp_avg_sq")
    first_moment = "exp_avg"
    compressible: ClassVar = {"exp_avg": True, "exp_avg_sq": False}

    def scalars(self, group: Mapping[str, Any], step: Any, **scalar_state: Any) -> dict[str, Any]:
        beta = group["beta"]
        return {
            "lr": group["lr"],
            "beta": beta,
            "rest": 1 - beta,
            "bound": group["bound"],
            "correction": 1 / sqrt(1 - beta**step),
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        lr: Any,
        beta: Any,
        rest: Any,
        bound: Any,
        correction: Any,
    ) -> Any:
        exp_avg = blended(exp_avg, grad, beta, rest)
        exp_avg_sq = blended(exp_avg_sq, grad * grad, beta, rest)
        size = maximum(sqrt(exp_avg_sq) * correction, absolute(exp_avg))
        return lr * where(size > bound, sign(exp_avg), exp_avg / bound), exp_avg, exp_avg_sq


class Tamed(lo.optim.FusedOptimizer):
    """A sign of a momentum, tamed."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta: float = 0.9,
        bound: Annotated[float, lo.optim.Range(0, 10, above=True)] = 0.5,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "bound": bound, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return TamedRule()


def cube(x: Any) -> Any:
    return x * x * x


class Cubic(lo.optim.DecayKind):
    """Decay in proportion to the cube of the weight, where the update does not move away from 0."""

    @staticmethod
    def pull(param: Any, delta: Any) -> Any:
        return where(param * delta == absolute(param * delta), cube(param), param)
