"""Adam, and its rule, which AdamW uses as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, maximum, sqrt
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions


class AdamRule(UpdateRule):
    """Adam's update from exponential moving averages of the gradient and its square, with bias corrections."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment: ClassVar[str | None] = "exp_avg"
    second_moment: ClassVar[str | None] = "exp_avg_sq"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas and the two bias corrections."""
        beta1, beta2 = group["betas"]
        return {
            "step_size": group["lr"] / (1 - beta1**step),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": sqrt(1 - beta2**step),
            "eps": group["eps"],
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        step_size: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        delta = step_size * exp_avg / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq


class AMSGradRule(AdamRule):
    """Adam's update divided by the root of the largest second moment so far."""

    state = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    second_moment = "max_exp_avg_sq"

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        max_exp_avg_sq: Any,
        step_size: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        delta = step_size * exp_avg / (sqrt(max_exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq, max_exp_avg_sq


class Adam(FusedOptimizer):
    """Adam: steps scaled per weight by running moments of the gradient.

    With gradient g at step t (which includes the decay λ·w; AdamW, where it does not, generalises better):

        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        w ← w − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    This is Algorithm 1 of the paper and `torch.optim.Adam`, with interchangeable state dicts.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1); 0.999 averages over 1000 steps.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        amsgrad: Divide by the largest v so far (Reddi et al., https://arxiv.org/abs/1904.09237); one more state.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015, https://arxiv.org/abs/1412.6980

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "The classic; prefer AdamW when weights decay."
    memory = "2 values (3 with amsgrad)"
    paper = "https://arxiv.org/abs/1412.6980"
    usual_lr = (1e-5, 3e-3)
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return AMSGradRule() if group["amsgrad"] else AdamRule()
