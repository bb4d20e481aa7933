"""RMSprop: gradients divided by their running root mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, maximum, minimum, sqrt
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class RMSpropRule(UpdateRule):
    """RMSprop's update: the gradient divided by its running root mean square."""

    state: ClassVar[tuple[str, ...]] = ("square_avg",)
    compressible: ClassVar[Mapping[str, bool]] = {"square_avg": False}
    second_moment = "square_avg"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate, decay rate, momentum."""
        return {
            "lr": group["lr"],
            "alpha": group["alpha"],
            "one_minus_alpha": 1 - group["alpha"],
            "eps": group["eps"],
            "momentum": group["momentum"],
            "zero": 0.0,
        }

    @staticmethod
    def update(param: Any, grad: Any, square_avg: Any, lr: Any, alpha: Any, one_minus_alpha: Any, eps: Any) -> Any:
        """One element's step."""
        square_avg = alpha * square_avg + one_minus_alpha * grad * grad
        return lr * grad / (sqrt(square_avg) + eps), square_avg


class MomentumRule(RMSpropRule):
    """RMSprop with momentum, a running sum of normalised gradients."""

    state = ("square_avg", "momentum_buffer")
    compressible: ClassVar[Mapping[str, bool]] = {"square_avg": False, "momentum_buffer": True}
    first_moment = "momentum_buffer"

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        square_avg: Any,
        momentum_buffer: Any,
        lr: Any,
        alpha: Any,
        one_minus_alpha: Any,
        eps: Any,
        momentum: Any,
    ) -> Any:
        """One element's step."""
        square_avg = alpha * square_avg + one_minus_alpha * grad * grad
        momentum_buffer = momentum * momentum_buffer + grad / (sqrt(square_avg) + eps)
        return lr * momentum_buffer, square_avg, momentum_buffer


class CenteredRule(RMSpropRule):
    """RMSprop that divides by the standard deviation of the gradient."""

    state = ("square_avg", "grad_avg")
    compressible: ClassVar[
        Mapping[str, bool]
    ] = {}  # The variance is a difference of the two, and rounding may exceed it.
    first_moment = "grad_avg"

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        square_avg: Any,
        grad_avg: Any,
        lr: Any,
        alpha: Any,
        one_minus_alpha: Any,
        eps: Any,
        zero: Any,
        largest: Any,
    ) -> Any:
        """One element's step."""
        square_avg = alpha * square_avg + one_minus_alpha * grad * grad
        grad_avg = alpha * grad_avg + one_minus_alpha * grad
        deviation = _deviation(square_avg, grad_avg, zero, largest)
        return lr * grad / (deviation + eps), square_avg, grad_avg


class CenteredMomentumRule(RMSpropRule):
    """RMSprop that divides by the standard deviation, with momentum."""

    state = ("square_avg", "momentum_buffer", "grad_avg")
    compressible: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}
    first_moment = "grad_avg"

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        square_avg: Any,
        momentum_buffer: Any,
        grad_avg: Any,
        lr: Any,
        alpha: Any,
        one_minus_alpha: Any,
        eps: Any,
        momentum: Any,
        zero: Any,
        largest: Any,
    ) -> Any:
        """One element's step."""
        square_avg = alpha * square_avg + one_minus_alpha * grad * grad
        grad_avg = alpha * grad_avg + one_minus_alpha * grad
        deviation = _deviation(square_avg, grad_avg, zero, largest)
        momentum_buffer = momentum * momentum_buffer + grad / (deviation + eps)
        return lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


def _deviation(square_avg: Any, grad_avg: Any, zero: Any, largest: Any) -> Any:
    # Rounding can make the variance of a constant gradient negative, whose root is NaN in torch. Infinity minus
    # infinity would be NaN as well, so the square is bounded.
    return sqrt(maximum(square_avg - minimum(grad_avg * grad_avg, largest), zero))


class RMSprop(FusedOptimizer):
    """RMSprop: gradients divided by their running root mean square.

    With gradient g (which includes the decay λ·w by default):

        v ← α·v + (1 − α)·g²
        d = √v,   or if centered   a ← α·a + (1 − α)·g,   d = √(v − a²)
        w ← w − lr·g/(d + ε),   or with momentum   b ← μ·b + g/(d + ε),   w ← w − lr·b

    This is `torch.optim.RMSprop`, with interchangeable state dicts; here a variance that rounding makes negative is
    treated as 0.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        alpha: α, decay rate of the averages, in [0, 1); 0.99 averages over 100 steps.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        momentum: μ ≥ 0; 0 keeps no buffer.
        centered: Divide by the standard deviation instead of the root mean square; one more state.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Hinton, Neural Networks for Machine Learning, lecture 6e, 2012; Graves (centered), Generating Sequences With
        Recurrent Neural Networks, 2013, https://arxiv.org/abs/1308.0850

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = RMSprop([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.9000, 0.9000])
    """

    when_to_use = "Recurrent networks and reinforcement learning, where published settings use it."
    memory = "1 value (one more with momentum, one more if centered)"
    paper = "https://arxiv.org/abs/1308.0850"
    usual_lr = (1e-5, 1e-2)
    ranges: ClassVar[Mapping[str, Range]] = {
        "alpha": Range(0, 1, below=True),
        "momentum": NON_NEGATIVE,
    }
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        if group["centered"]:
            return CenteredMomentumRule() if group["momentum"] else CenteredRule()
        return MomentumRule() if group["momentum"] else RMSpropRule()
