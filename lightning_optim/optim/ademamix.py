"""AdEMAMix: AdamW with a second, very slow momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, minimum, sqrt
from lightning_optim.optim.adam import AdamRule
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions


class AdEMAMixRule(AdamRule):
    """AdEMAMix's update: Adam's numerator plus a multiple of an average over about ten thousand steps."""

    # The slow average is the small mean of thousands of large steps, whose rounding in 8 bits would exceed it.
    state = ("exp_avg", "exp_avg_sq", "exp_avg_slow")

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Adam's scalars, and the present α and β₃."""
        beta1, beta2, beta3 = group["betas"]
        alpha = group["alpha"]
        if group["alpha_warmup"]:
            alpha = alpha * minimum(step / group["alpha_warmup"], 1.0)
        if group["beta3_warmup"]:
            # The half-life of the average grows linearly from that of β₁ to that of β₃.
            done = minimum(step / group["beta3_warmup"], 1.0)
            beta3 = beta1 ** (math.log(beta3) / ((1 - done) * math.log(beta3) + done * math.log(beta1)))
        scalars = super().scalars(dict(group) | {"betas": (beta1, beta2)}, step)
        return scalars | {
            "slow_step": group["lr"] * alpha,
            "beta3": beta3,
            "one_minus_beta3": 1 - beta3,
        }

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        exp_avg_slow: Any,
        step_size: Any,
        slow_step: Any,
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
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        exp_avg_slow = beta3 * exp_avg_slow + one_minus_beta3 * grad
        numerator = step_size * exp_avg + slow_step * exp_avg_slow
        delta = numerator / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps)
        return delta, exp_avg, exp_avg_sq, exp_avg_slow


class AdEMAMix(FusedOptimizer):
    """AdEMAMix: AdamW with an additional average of the gradient over about ten thousand steps.

    With gradient g at step t:

        w ← (1 − lr·λ)·w
        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²,   s ← β₃·s + (1 − β₃)·g
        w ← w − lr · (m/(1 − β₁ᵗ) + α·s) / (√(v/(1 − β₂ᵗ)) + ε)

    This is Algorithm 1 of the paper and `pytorch_optimizer.AdEMAMix(weight_decouple=True)`. Without the two warmups the
    slow average can make early training diverge; the paper warms both up over the whole run:

        α(t) = α·min(t/T, 1),   β₃(t) = β₁^(ln β₃ / ((1 − t/T)·ln β₃ + t/T·ln β₁)) up to t = T, then β₃

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂, β₃), each in [0, 1); β₃ = 0.9999 is for runs of at least 100 000 steps.
        alpha: α ≥ 0, weight of the slow average; the paper recommends 4 to 10.
        alpha_warmup: Steps T over which α rises from 0; 0 for none.
        beta3_warmup: Steps T over which β₃ rises from β₁, which must be above 0; 0 for none.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Pagliardini, Ablin & Grangier, The AdEMAMix Optimizer: Better, Faster, Older, 2024,
        https://arxiv.org/abs/2409.03137

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdEMAMix([weight], lr=0.1, alpha_warmup=1000, beta3_warmup=1000)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "Long language-model runs: reaches AdamW's loss in fewer tokens, and forgets less."
    memory = "3 values"
    paper = "https://arxiv.org/abs/2409.03137"
    usual_lr = (1e-5, 3e-3)
    ranges: ClassVar[Mapping[str, Range]] = {
        "alpha": NON_NEGATIVE,
        "alpha_warmup": NON_NEGATIVE,
        "beta3_warmup": NON_NEGATIVE,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        alpha_warmup: int = 0,
        beta3_warmup: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "alpha_warmup": alpha_warmup,
                "beta3_warmup": beta3_warmup,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        if group["beta3_warmup"] and not 0 < group["betas"][0] <= group["betas"][2]:
            raise ValueError(f"AdEMAMix: Invalid betas={group['betas']}: beta3_warmup needs 0 < betas[0] <= betas[2].")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return AdEMAMixRule()
