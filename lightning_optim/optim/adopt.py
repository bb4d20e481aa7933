"""ADOPT: Adam normalised by past gradients only, which converges with any β₂."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, maximum, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import group_decay
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class ADOPTRule(UpdateRule):
    """ADOPT's update: each gradient is divided by the root of the previous second moment; the first only sets it."""

    state = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas and the clipping threshold, which is 0 at the first step, so that m and w do not change."""
        beta1, beta2 = group["betas"]
        first = step == 1
        decay, _ = group_decay(group)
        return {
            "lr": group["lr"],
            "decay": where(first, 0.0, decay),
            "threshold": where(first, 0.0, math.inf if group["clip_exp"] is None else (step - 1) ** group["clip_exp"]),
            "floor": where(first, 1.0, group["eps"]),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "grad_sq_weight": where(first, 1.0, 1 - beta2),
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        lr: Any,
        threshold: Any,
        floor: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        grad_sq_weight: Any,
    ) -> Any:
        """One element's step."""
        normed = grad / maximum(sqrt(exp_avg_sq), floor)
        normed = minimum(maximum(normed, -threshold), threshold)
        exp_avg = beta1 * exp_avg + one_minus_beta1 * normed
        exp_avg_sq = beta2 * exp_avg_sq + grad_sq_weight * grad * grad
        return lr * exp_avg, exp_avg, exp_avg_sq


class ADOPT(FusedOptimizer):
    """ADOPT: Adam with each gradient divided by the root of the second moment of previous gradients.

    With gradient g at step t > 1, where the first step sets v ← g² and changes nothing else:

        w ← (1 − lr·λ)·w
        n = clip(g/max(√v, ε), ±(t − 1)^κ)
        m ← β₁·m + (1 − β₁)·n
        w ← w − lr·m
        v ← β₂·v + (1 − β₂)·g²

    Published implementations differ. This is `timm.optim.Adopt(decoupled=True)`: κ = 0.333, without decay at the first
    step. The paper has κ = 0.25; the authors' latest code has a warmup of ε instead of clipping.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1); according to the paper any β₂ works.
        eps: ε, the smallest denominator, in units of the gradient.
        clip_exp: κ ≥ 0, the exponent by which the clipping threshold grows; None for no clipping.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Taniguchi et al., ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate, 2024,
        https://arxiv.org/abs/2411.02853

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ADOPT([weight], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.data
        tensor([0.9900, 0.9900, 0.9900])
    """

    when_to_use = "Where Adam is unstable, or small batches make β₂ hard to choose."
    memory = "2 values"
    paper = "https://arxiv.org/abs/2411.02853"
    usual_lr = (1e-5, 3e-3)
    ranges: ClassVar[Mapping[str, Range]] = {
        "clip_exp": replace(NON_NEGATIVE, optional=True),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float | None = 0.333,
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "clip_exp": clip_exp,
                "weight_decay": weight_decay,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return ADOPTRule()
