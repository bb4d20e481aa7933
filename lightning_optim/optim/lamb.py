"""LAMB: Adam's direction with a step proportional to the norm of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, absolute, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import decay_form
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.matrix_form import refuse_split
from lightning_optim.optim.moments import update_moments
from lightning_optim.optim.shared_options import SharedOptions


class LAMBRule(UpdateRule):
    """LAMB's update: Adam's direction plus decay, scaled per tensor to the norm of the weights."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment: ClassVar[str | None] = "exp_avg"
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    sums: ClassVar[tuple[str, ...]] = ("param_sq", "step_sq")

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, bias corrections, and the settings of the trust ratio."""
        beta1, beta2 = group["betas"]
        corrected = group["bias_correction"]
        shrinks = decay_form(group) == "shrink"  # Other kinds do not enter the update or its norm.
        return {
            "lr": group["lr"],
            "step_size": group["lr"] / (1 - beta1**step) if corrected else group["lr"],
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": sqrt(1 - beta2**step) if corrected else 1.0,
            "eps": group["eps"],
            "decay_inside": float(shrinks and not group["decoupled_decay"]),
            "shrinks": float(shrinks),
            "adapt": float(group["weight_decay"] != 0 or group["always_adapt"]),
            "ratio_limit": 1.0 if group["trust_clip"] else float("inf"),
        }

    @staticmethod
    def sums_update(
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
        decay: Any,
        decay_inside: Any,
    ) -> Any:
        """Terms w² and (lr·u)² of one element, with the new moments."""
        exp_avg, exp_avg_sq = update_moments(grad, exp_avg, exp_avg_sq, beta1, one_minus_beta1, beta2, one_minus_beta2)
        step = step_size * exp_avg / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps) + decay_inside * decay * param
        return param * param, step * step

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        """Step size and decay multiplied by ‖w‖/‖u‖, [tensors] each."""
        inside = scalars["decay_inside"] * scalars["decay"]
        outside = scalars["decay"] - inside
        norm = sqrt(sums["param_sq"]) * absolute(1 - scalars["shrinks"] * outside)
        step_norm = sqrt(sums["step_sq"])
        adapts = (norm > 0) & (step_norm > 0) & (scalars["adapt"] != 0)
        # The sum is of (lr·u)², which is 0 for lr = 0; weights do not change then, for any ratio.
        ratio = where(adapts, minimum(norm * scalars["lr"] / step_norm, scalars["ratio_limit"]), 1.0)
        return {"step_size": scalars["step_size"] * ratio, "decay": inside * ratio + outside}

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
        return step_size * exp_avg / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps), exp_avg, exp_avg_sq


class LAMB(FusedOptimizer):
    """LAMB: Adam's direction with a step proportional to the norm of each tensor, for very large batches.

    With gradient g at step t, and per tensor:

        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        u = m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε) + λ·w
        w ← w − lr · ‖w‖/‖u‖ · u

    The ratio ‖w‖/‖u‖ is 1 where either norm is 0, and for groups without weight decay (biases, norms) unless
    ``always_adapt``. This is Algorithm 2 of the paper with φ the identity, and `timm.optim.Lamb(max_grad_norm=None)`.
    By default timm's and NVIDIA's optimizers also clip the global gradient norm to 1; use
    `GradientClipping(max_norm=1.0)` for that. With ``cautious``, components of Adam's direction are left out, and the
    ratio is that of the whole u, whereas timm uses that of the remaining components. A stack of matrices, such as
    experts, and a fused projection are one tensor with one ratio, as in all published code.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, relative to the weights: about the fraction of a tensor's norm that each step moves; a float
            or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; a part of u, so that the ratio scales it as well. ``weight_decay_kind`` determines how it
            depends on the learning rate.
        bias_correction: Whether to divide m and v by 1 − βᵗ.
        trust_clip: Whether to limit the ratio to at most 1 (LAMBC, https://arxiv.org/abs/2011.13584).
        always_adapt: Whether to use the ratio in groups without weight decay as well.
        decoupled_decay: Whether to decay the weights before u and separately from it, as in AdamW.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020,
        https://arxiv.org/abs/1904.00962

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.full((4,), 2.0))
        >>> optimizer = LAMB([weight], lr=0.1, always_adapt=True, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # a tenth of the norm
        >>> weight.data
        tensor([1.8000, 1.8000, 1.8000, 1.8000])
    """

    when_to_use = "Very large batches (thousands to tens of thousands) for models that need Adam, such as BERT."
    memory = "2 values"
    paper = "https://arxiv.org/abs/1904.00962"
    usual_lr = (5e-4, 2e-2)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "trust_clip": trust_clip,
                "always_adapt": always_adapt,
                "decoupled_decay": decoupled_decay,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        refuse_split(cls.__name__, group, "its trust ratio is that of the whole tensor, as published")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return LAMBRule()
