"""StableAdamW: AdamW with a lower learning rate for tensors whose gradients are large for their second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Scalar, UpdateRule, maximum, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import decay_form
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


def _new_square(grad: Any, exp_avg_sq: Any, beta2_hat: Any, one_minus_beta2_hat: Any, largest: Any) -> Any:
    # The average is bounded, because an infinity would never leave it, and the weight would never change again.
    return minimum(beta2_hat * exp_avg_sq + one_minus_beta2_hat * grad * grad, largest)


class StableAdamWRule(UpdateRule):
    """Adam's update with debiased betas, divided per tensor by the RMS of g/√v where that is above 1."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment: ClassVar[str | None] = "exp_avg"
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    sums: ClassVar[tuple[str, ...]] = ("ratio_sq",)

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The debiased betas of this step, which make bias corrections unnecessary."""
        beta1_hat, beta2_hat = ((beta**step - beta) / (beta**step - 1) for beta in group["betas"])
        return {
            "lr": group["lr"],
            "beta1_hat": beta1_hat,
            "one_minus_beta1_hat": 1 - beta1_hat,
            "beta2_hat": beta2_hat,
            "one_minus_beta2_hat": 1 - beta2_hat,
            "eps": group["eps"],
            "eps_sq": group["eps"] ** 2,
            "decay_is_a_rate": float(decay_form(group) != "rescale"),
        }

    @staticmethod
    def sums_update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        beta2_hat: Any,
        one_minus_beta2_hat: Any,
        eps_sq: Any,
        largest: Any,
    ) -> Any:
        """Term g²/v of one element, with the new v."""
        exp_avg_sq = _new_square(grad, exp_avg_sq, beta2_hat, one_minus_beta2_hat, largest)
        ratio = grad / sqrt(maximum(exp_avg_sq, eps_sq))  # The square of a finite g may be infinite.
        return (ratio * ratio,)

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        """Learning rate and decay divided by max(1, RMS), [tensors] each."""
        divisor = maximum(sqrt(sums["ratio_sq"] / numel), sums["ratio_sq"].new_ones(()))
        decay = where(scalars["decay_is_a_rate"] != 0, scalars["decay"] / divisor, scalars["decay"])
        return {"lr": scalars["lr"] / divisor, "decay": decay}

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        lr: Any,
        beta1_hat: Any,
        one_minus_beta1_hat: Any,
        beta2_hat: Any,
        one_minus_beta2_hat: Any,
        eps: Any,
        largest: Any,
    ) -> Any:
        """One element's step."""
        exp_avg = beta1_hat * exp_avg + one_minus_beta1_hat * grad
        exp_avg_sq = _new_square(grad, exp_avg_sq, beta2_hat, one_minus_beta2_hat, largest)
        return lr * exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq


class StableAdamW(FusedOptimizer):
    """StableAdamW: AdamW with Adafactor's update clipping in place of gradient clipping.

    With gradient g at step t, and per tensor:

        β̂ = (βᵗ − β) / (βᵗ − 1)   for β₁ and β₂
        m ← β̂₁·m + (1 − β̂₁)·g,   v ← β̂₂·v + (1 − β̂₂)·g²
        η = lr / max(1, √mean(g² / max(v, ε²)))
        w ← (1 − η·λ)·w
        w ← w − η · m / (√v + ε)

    This is Algorithm 2 of the paper with the decay multiplied by η as well, and `optimi.StableAdamW`. A gradient that
    is suddenly large for its tensor (v is out of date, the usual cause of loss spikes) makes that tensor's step small.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1); β₂ = 0.99 is that of later work, because this
            optimizer is meant to limit the effect of outdated second moments.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``, with η for lr in every kind but `l2`.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Wortsman et al., Stable and low-precision training for large-scale vision-language models, 2023,
        https://arxiv.org/abs/2304.13013

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "AdamW that survives loss spikes, without gradient clipping; low precision, large vision models."
    memory = "2 values"
    paper = "https://arxiv.org/abs/2304.13013"
    usual_lr = (1e-5, 3e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
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
        return StableAdamWRule()
