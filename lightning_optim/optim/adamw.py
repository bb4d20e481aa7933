"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.optim.adam import AdamRule, AMSGradRule
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class AdamW(FusedOptimizer):
    """AdamW: Adam with weight decay decoupled from the gradient.

    With gradient g at step t:

        w ← (1 − lr·λ)·w
        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        w ← w − lr · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    This is Algorithm 2 of the paper with the schedule multiplier inside lr, and `torch.optim.AdamW`, with
    interchangeable state dicts; the decay independent of lr in the paper is ``weight_decay_kind="independent"``.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1); large language models use (0.9, 0.95).
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``. torch's 0.01 is mild; 0.1 is common.
        amsgrad: Divide by the largest v so far (Reddi et al., https://arxiv.org/abs/1904.09237); one more state.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, https://arxiv.org/abs/1711.05101

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8500, 0.8500, 0.8500])
    """

    when_to_use = "The default for transformers, and a safe first choice elsewhere."
    memory = "2 values (3 with amsgrad)"
    paper = "https://arxiv.org/abs/1711.05101"
    usual_lr = (1e-5, 4e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
