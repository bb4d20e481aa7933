"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, sign
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class LionRule(UpdateRule):
    """Lion's update: the sign of an average in which the newest gradient has more weight than in the momentum."""

    state = ("exp_avg",)
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True}
    counts_steps = False
    first_moment = "exp_avg"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate and betas."""
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        lr: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
    ) -> Any:
        """One element's step."""
        delta = lr * sign(beta1 * exp_avg + one_minus_beta1 * grad)
        return delta, beta2 * exp_avg + one_minus_beta2 * grad


class Lion(FusedOptimizer):
    """Lion: every weight moves by exactly lr, in the direction of the sign of an averaged gradient.

    With gradient g:

        w ← (1 − lr·λ)·w
        w ← w − lr·sign(β₁·m + (1 − β₁)·g)
        m ← β₂·m + (1 − β₂)·g

    This is Program 1 of the paper and `lion_pytorch.Lion`. Use a learning rate 3 to 10 times smaller than for AdamW,
    and a weight decay larger by the same factor, which preserves lr·λ.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, the size of each step; a float or a one-element tensor.
        betas: (β₁, β₂), each in [0, 1): weight of the momentum in the direction, and decay rate of the momentum.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, https://arxiv.org/abs/2302.06675

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Lion([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000])
    """

    when_to_use = "Half of AdamW's state; large batches in vision and language, with a smaller lr."
    memory = "1 value"
    paper = "https://arxiv.org/abs/2302.06675"
    usual_lr = (1e-5, 1e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return LionRule()
