"""Adan: Nesterov momentum estimated from differences of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, sqrt, where
from lightning_optim.kernels.weight_decay import decay_form, group_decay
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class AdanRule(UpdateRule):
    """Adan's update from averages of the gradient, of its change, and of the square of the extrapolated gradient."""

    state = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "previous_grad")
    compressible: ClassVar[Mapping[str, bool]] = {
        "exp_avg": True,
        "exp_avg_sq": False,
        "exp_avg_diff": True,
        "previous_grad": True,
    }
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, bias corrections, and the coefficients of the proximal decay step."""
        beta1, beta2, beta3 = group["betas"]
        decay, _ = group_decay(group)
        solved = decay_form(group) == "shrink" and not group["no_prox"]
        shrink = 1 / (1 + decay) if solved else 1.0
        return {
            "step_size": shrink * group["lr"] / (1 - beta1**step),
            "diff_step": shrink * group["lr"] * beta2 / (1 - beta2**step),
            "decay": shrink * decay,
            "has_previous": where(step == 1, 0.0, 1.0),
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "beta3": beta3,
            "one_minus_beta3": 1 - beta3,
            "bias_correction2_sqrt": sqrt(1 - beta3**step),
            "eps": group["eps"],
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        exp_avg_diff: Any,
        previous_grad: Any,
        step_size: Any,
        diff_step: Any,
        has_previous: Any,
        beta1: Any,
        one_minus_beta1: Any,
        beta2: Any,
        one_minus_beta2: Any,
        beta3: Any,
        one_minus_beta3: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        diff = has_previous * (grad - previous_grad)
        ahead = grad + beta2 * diff
        exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
        exp_avg_diff = beta2 * exp_avg_diff + one_minus_beta2 * diff
        exp_avg_sq = beta3 * exp_avg_sq + one_minus_beta3 * ahead * ahead
        numerator = step_size * exp_avg + diff_step * exp_avg_diff
        delta = numerator / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq, exp_avg_diff, grad


class Adan(FusedOptimizer):
    """Adan: adaptive steps with Nesterov momentum, estimated from the change of the gradient.

    With gradient g at step t, and d its difference from the previous gradient (0 at the first step):

        m ← β₁·m + (1 − β₁)·g,   δ ← β₂·δ + (1 − β₂)·d,   v ← β₃·v + (1 − β₃)·(g + β₂·d)²
        u = lr · (m/(1 − β₁ᵗ) + β₂·δ/(1 − β₂ᵗ)) / (√(v/(1 − β₃ᵗ)) + ε)
        w ← (w − u)/(1 + lr·λ),   or with no_prox   w ← (1 − lr·λ)·w − u

    This is Algorithm 1 of the paper with the bias corrections and notation of the authors' code, where betas are decay
    rates (1 − β in the paper), and `pytorch_optimizer.Adan`, whose ``weight_decouple=True`` is ``no_prox``.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step, up to 5 to 10 times that of AdamW; a float or a one-element
            tensor.
        betas: Decay rates (β₁, β₂, β₃) of the three averages, each in [0, 1).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``, whose coefficient replaces lr·λ above.
        no_prox: Whether to decay as in AdamW instead of by the proximal step.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Xie et al., Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, 2022,
        https://arxiv.org/abs/2208.06677

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Adan([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "Vision transformers and large batches, with a larger lr than AdamW's; memory permitting."
    memory = "4 values"
    paper = "https://arxiv.org/abs/2208.06677"
    usual_lr = (1e-4, 2e-2)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "no_prox": no_prox,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return AdanRule()
