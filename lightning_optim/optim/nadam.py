"""NAdam: Adam with Nesterov momentum and a momentum schedule."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, sqrt
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions


class NAdamRule(UpdateRule):
    """NAdam's update: Adam's denominator, and the momentum of the next step in the numerator."""

    state = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    scalar_state: ClassVar[Mapping[str, float]] = MappingProxyType({"mu_product": 1.0})
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, and the weights of gradient and momentum under the momentum schedule."""
        beta1, beta2 = group["betas"]
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
        mu_product = scalar_state["mu_product"] * mu
        return {
            "grad_step": group["lr"] * (1 - mu) / (1 - mu_product),
            "momentum_step": group["lr"] * mu_next / (1 - mu_product * mu_next),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": sqrt(1 - beta2**step),
            "eps": group["eps"],
            "mu_product": mu_product,
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        grad_step: Any,
        momentum_step: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        delta = (grad_step * grad + momentum_step * exp_avg) / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq


class NAdam(FusedOptimizer):
    """NAdam: Adam whose step looks one momentum step ahead, with a momentum that grows over training.

    With gradient g at step t (which includes the decay λ·w by default):

        μₜ = β₁·(1 − ½·0.96^(t·ψ)),   Π ← Π·μₜ
        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        w ← w − lr · [(1 − μₜ)/(1 − Π)·g + μₜ₊₁/(1 − Π·μₜ₊₁)·m] / (√(v/(1 − β₂ᵗ)) + ε)

    This is `torch.optim.NAdam`, with interchangeable state dicts; Π (`mu_product`) is stored in float64. `NAdamW` is
    the same without the schedule of μ.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        momentum_decay: ψ ≥ 0: μ is half of β₁ at first, and closes 4·ψ per cent of the gap to β₁ per step.
        decoupled_weight_decay: torch's name for ``weight_decay_kind="decoupled"``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Dozat, Incorporating Nesterov Momentum into Adam, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = NAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8944, 0.8944, 0.8944])
    """

    when_to_use = "Where Adam works and published settings use it; prefer NAdamW for new ones."
    memory = "2 values"
    paper = "https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ"
    usual_lr = (1e-5, 3e-3)
    ranges: ClassVar[Mapping[str, Range]] = {
        "momentum_decay": NON_NEGATIVE,
    }
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
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
                "momentum_decay": momentum_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return NAdamRule()
