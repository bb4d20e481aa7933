"""Adagrad: gradients divided by the root of the sum of all their squares so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, sqrt
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class AdagradRule(UpdateRule):
    """Adagrad's update: the gradient divided by the root of the sum of squared gradients."""

    state = ("sum",)
    compressible: ClassVar[Mapping[str, bool]] = {"sum": False}
    second_moment = "sum"

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        """Return the initial value of the sum, `initial_accumulator_value`."""
        return {"sum": group["initial_accumulator_value"]}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The decayed learning rate."""
        return {"step_size": group["lr"] / (1 + (step - 1) * group["lr_decay"]), "eps": group["eps"]}

    @staticmethod
    def update(param: Any, grad: Any, square_sum: Any, step_size: Any, eps: Any) -> Any:
        """One element's step."""
        square_sum = square_sum + grad * grad
        return step_size * grad / (sqrt(square_sum) + eps), square_sum


class Adagrad(FusedOptimizer):
    """Adagrad: each weight's step shrinks with the sum of its squared gradients, so rare features keep learning.

    With gradient g at step t (which includes the decay λ·w by default):

        s ← s + g²
        w ← w − lr/(1 + (t − 1)·η) · g / (√s + ε)

    This is `torch.optim.Adagrad`, with interchangeable state dicts. Gradients must be dense.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, the size of the first step; a float or a one-element tensor.
        lr_decay: η ≥ 0, per step; rarely needed, because s alone makes steps shrink as 1/√t.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        initial_accumulator_value: Initial s ≥ 0; 0.1 limits the first steps.
        eps: ε, added to the denominator, in units of the gradient.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Duchi, Hazan & Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011,
        https://jmlr.org/papers/v12/duchi11a.html

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Adagrad([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "Sparse or rare features, and convex problems; in deep networks its steps fade."
    memory = "1 value"
    paper = "https://jmlr.org/papers/v12/duchi11a.html"
    usual_lr = (1e-3, 1e-1)
    ranges: ClassVar[Mapping[str, Range]] = {
        "lr_decay": NON_NEGATIVE,
        "initial_accumulator_value": NON_NEGATIVE,
    }
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return AdagradRule()
