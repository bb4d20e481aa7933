"""NAdamW: AdamW with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import UpdateRule, sqrt
from lightning_optim.optim.adam import AdamRule
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions


class NAdamWRule(AdamRule):
    """Adam's update with Nesterov momentum: the first moment of the step includes the newest gradient once more."""

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
        ahead = beta1 * exp_avg + one_minus_beta1 * grad
        delta = step_size * ahead / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq


class NAdamW(FusedOptimizer):
    """NAdamW: AdamW whose step looks one momentum step ahead.

    With gradient g at step t:

        w ← (1 − lr·λ)·w
        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        w ← w − lr · (β₁·m + (1 − β₁)·g)/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    This is the strongest baseline of the AlgoPerf benchmark, and `timm.optim.NAdamW`. It differs from `NAdam` with
    decoupled decay, which has a momentum schedule.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Choi et al., On Empirical Comparisons of Optimizers for Deep Learning, 2019, Table 1,
        https://arxiv.org/abs/1910.05446; Dahl et al., Benchmarking Neural Network Training Algorithms, 2023,
        https://arxiv.org/abs/2306.07179

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = NAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8100, 0.8100, 0.8100])
    """

    when_to_use = "In place of AdamW, at the same cost and with the same settings; the AlgoPerf baseline."
    memory = "2 values"
    paper = "https://arxiv.org/abs/1910.05446"
    usual_lr = (1e-5, 3e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return NAdamWRule()
