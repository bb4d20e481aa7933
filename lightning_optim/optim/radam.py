"""RAdam: Adam that uses its second moment only once the variance of that is finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, maximum, sqrt, where
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions

TRACTABLE = 5.0
"""Effective length of the second moment's average, in samples, above which its variance is treated as finite."""


class RAdamRule(UpdateRule):
    """RAdam's update: momentum at first, then Adam with a rectification factor that rises to 1."""

    state = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, bias corrections and rectification."""
        beta1, beta2 = group["betas"]
        bias_correction2 = 1 - beta2**step
        bias_correction2_sqrt = sqrt(bias_correction2)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / bias_correction2
        # Both sides of `where` are evaluated, so the lengths are clamped to keep the root real where it is not used.
        long, limit = maximum(length, TRACTABLE), maximum(longest, TRACTABLE)
        rectification = sqrt((long - 4) * (long - 2) * limit / ((limit - 4) * (limit - 2) * long))
        step_size = group["lr"] / (1 - beta1**step)
        return {
            "step_size": where(length > TRACTABLE, step_size * rectification * bias_correction2_sqrt, step_size),
            "adaptive": where(length > TRACTABLE, 1.0, 0.0),
            "plain": where(length > TRACTABLE, 0.0, 1.0),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": bias_correction2_sqrt,
            "eps": group["eps"],
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        step_size: Any,
        adaptive: Any,
        plain: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        delta = step_size * exp_avg / where(adaptive > plain, sqrt(exp_avg_sq) + eps, plain)
        return delta, exp_avg, exp_avg_sq


class RAdam(FusedOptimizer):
    """RAdam: Adam with a built-in warmup that follows the uncertainty of its second moment.

    With gradient g at step t (which includes the decay λ·w by default):

        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²,   m̂ = m/(1 − β₁ᵗ)
        ρ∞ = 2/(1 − β₂) − 1,   ρ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ)
        ρ > 5:  r = √((ρ − 4)(ρ − 2)·ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)·ρ)),   w ← w − lr·r·m̂·√(1 − β₂ᵗ)/(√v + ε)
        else:   w ← w − lr·m̂

    With β₂ = 0.999 the first five steps are plain momentum, whose size depends on that of the gradient. This is
    `torch.optim.RAdam`, with interchangeable state dicts (the paper has ρ > 4).

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        decoupled_weight_decay: torch's name for ``weight_decay_kind="decoupled"``, which the authors' code uses.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020, https://arxiv.org/abs/1908.03265

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8000, 0.8000, 0.8000])
    """

    when_to_use = "Adam without a warmup schedule."
    memory = "2 values"
    paper = "https://arxiv.org/abs/1908.03265"
    usual_lr = (1e-5, 3e-3)
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return RAdamRule()
