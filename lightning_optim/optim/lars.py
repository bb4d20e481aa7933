"""LARS: SGD with a step proportional to the norm of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.matrix_form import refuse_split
from lightning_optim.optim.shared_options import SharedOptions


class LARSRule(UpdateRule):
    """LARS's update without momentum: the gradient, scaled per tensor to the norm of the weights."""

    counts_steps: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ("param_sq", "grad_sq")

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate, and the settings of the trust ratio."""
        is_l2 = WeightDecayKind(group["weight_decay_kind"]) is WeightDecayKind.L2
        return {
            "lr": group["lr"],
            "trust_ratio": 1.0,
            "trust_coeff": group["trust_coeff"],
            "eps": group["eps"],
            "l2_inside": group["weight_decay"] if is_l2 else 0.0,
            "adapt": float(group["weight_decay"] != 0 or group["always_adapt"]),
            "trust_clip": float(group["trust_clip"]),
        }

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """Coefficients without the L2 term, which `rescale` adds after the norm of the gradient has been computed."""
        return usual[0], 0.0

    @staticmethod
    def sums_update(param: Any, grad: Any) -> Any:
        """Terms w² and g² of one element."""
        return param * param, grad * grad

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        """Trust ratio and coefficient of the L2 term, [tensors] each."""
        norm, grad_norm = sqrt(sums["param_sq"]), sqrt(sums["grad_sq"])
        ratio = scalars["trust_coeff"] * norm / (grad_norm + scalars["l2_inside"] * norm + scalars["eps"])
        ratio = where((norm > 0) & (grad_norm > 0), ratio, 1.0)
        clipped = minimum(ratio / scalars["lr"], ratio.new_ones(()))
        ratio = where(scalars["trust_clip"] != 0, clipped, ratio)
        return {"trust_ratio": where(scalars["adapt"] != 0, ratio, 1.0), "l2": scalars["l2_inside"]}

    @staticmethod
    def update(param: Any, grad: Any, lr: Any, trust_ratio: Any) -> Any:
        """One element's step."""
        return (lr * (trust_ratio * grad),)


class LARSMomentumRule(LARSRule):
    """LARS's update with momentum, a running sum of scaled gradients."""

    state = ("momentum_buffer",)
    compressible: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}
    counts_steps = True  # The step count is needed because the first gradient is not dampened.
    first_moment = "momentum_buffer"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Scalars as without momentum, and the weights of gradient and buffer in the step."""
        momentum = group["momentum"]
        return super().scalars(group, step) | {
            "momentum": momentum,
            "grad_weight": where(step == 1, 1.0, 1 - group["dampening"]),
            "grad_share": float(group["nesterov"]),
            "buffer_share": momentum if group["nesterov"] else 1.0,
        }

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        momentum_buffer: Any,
        lr: Any,
        trust_ratio: Any,
        momentum: Any,
        grad_weight: Any,
        grad_share: Any,
        buffer_share: Any,
    ) -> Any:
        """One element's step."""
        grad = trust_ratio * grad
        momentum_buffer = momentum * momentum_buffer + grad_weight * grad
        return lr * (grad_share * grad + buffer_share * momentum_buffer), momentum_buffer

    @staticmethod
    def sums_update(param: Any, grad: Any, momentum_buffer: Any) -> Any:  # type: ignore[override]
        """Terms w² and g² of one element."""
        return param * param, grad * grad


class LARS(FusedOptimizer):
    """LARS: SGD with a step proportional to the norm of each tensor, for very large batches.

    With gradient g, and per tensor:

        ratio = c·‖w‖ / (‖g‖ + λ·‖w‖ + ε)
        b ← μ·b + (1 − d)·ratio·(g + λ·w)   (the first time b ← ratio·(g + λ·w))
        w ← w − lr·b,   or with Nesterov momentum   w ← w − lr·(ratio·(g + λ·w) + μ·b)

    The ratio is 1 where either norm is 0, and for groups without weight decay (biases, norms) unless ``always_adapt``.
    This is Algorithm 1 of the paper and `timm.optim.Lars`. A stack of matrices, such as experts, and a fused projection
    are one tensor with one ratio, as in all published code.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, multiplied by ``trust_coeff``; a float or a one-element tensor.
        momentum: μ ≥ 0. 0 keeps no state; the paper uses 0.9.
        dampening: d in [0, 1], the fraction of each new gradient that is left out.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``. Only `l2`, as in the paper, enters the ratio.
        nesterov: Whether to use Nesterov momentum; requires momentum above 0 and dampening 0.
        trust_coeff: c, the fraction of a tensor's norm that a step of lr 1 moves.
        eps: ε, added to the denominator of the ratio, in units of the gradient.
        trust_clip: Whether the ratio may only lower the learning rate: ratio = min(ratio/lr, 1) (LARC).
        always_adapt: Whether to use the ratio in groups without weight decay as well.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        You et al., Large Batch Training of Convolutional Networks, 2017, https://arxiv.org/abs/1708.03888

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.full((4,), 2.0))
        >>> optimizer = LARS([weight], lr=1.0, trust_coeff=0.1, always_adapt=True)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # a tenth of the norm
        >>> weight.data
        tensor([1.8000, 1.8000, 1.8000, 1.8000])
    """

    when_to_use = "Very large batches with convolutional networks; contrastive pretraining."
    memory = "1 value (0 without momentum)"
    paper = "https://arxiv.org/abs/1708.03888"
    usual_lr = (0.1, 20.0)
    ranges: ClassVar[Mapping[str, Range]] = {
        "momentum": NON_NEGATIVE,
        "dampening": Range(0, 1),
        "trust_coeff": NON_NEGATIVE,
    }
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coeff: float = 1e-3,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "trust_coeff": trust_coeff,
                "eps": eps,
                "trust_clip": trust_clip,
                "always_adapt": always_adapt,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        refuse_split(cls.__name__, group, "its trust ratio is that of the whole tensor, as published")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            given = f"momentum={group['momentum']}, dampening={group['dampening']}"
            raise ValueError(f"LARS: nesterov=True needs momentum above 0 and dampening=0, not {given}.")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return LARSMomentumRule() if group["momentum"] else LARSRule()
