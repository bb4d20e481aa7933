"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, where
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class SGDRule(UpdateRule):
    """Plain gradient descent."""

    counts_steps: ClassVar[bool] = False

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The learning rate."""
        return {"lr": group["lr"]}

    @staticmethod
    def update(param: Any, grad: Any, lr: Any) -> Any:
        """One element's step."""
        return (lr * grad,)


class MomentumRule(UpdateRule):
    """Gradient descent along a running sum of gradients."""

    state = ("momentum_buffer",)
    compressible: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}
    counts_steps: ClassVar[bool] = False
    first_moment = "momentum_buffer"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate, momentum, and the weight of the new gradient."""
        return {"lr": group["lr"], "momentum": group["momentum"], "grad_weight": 1 - group["dampening"]}

    @staticmethod
    def update(param: Any, grad: Any, momentum_buffer: Any, lr: Any, momentum: Any, grad_weight: Any) -> Any:
        """One element's step."""
        momentum_buffer = momentum * momentum_buffer + grad_weight * grad
        return lr * momentum_buffer, momentum_buffer


class DampenedRule(MomentumRule):
    """Momentum with dampening of all but the first gradient, as in torch; only this rule needs a step count."""

    counts_steps = True

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """As for momentum, with full weight for the first gradient."""
        return super().scalars(group, step) | {"grad_weight": where(step == 1, 1.0, 1 - group["dampening"])}


class NesterovRule(MomentumRule):
    """Nesterov momentum, which looks one step ahead."""

    @staticmethod
    def update(param: Any, grad: Any, momentum_buffer: Any, lr: Any, momentum: Any, grad_weight: Any) -> Any:
        """One element's step."""
        momentum_buffer = momentum * momentum_buffer + grad_weight * grad
        return lr * (grad + momentum * momentum_buffer), momentum_buffer


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum.

    With gradient g (which includes the decay λ·w by default):

        b ← μ·b + (1 − d)·g   (the first time b ← g)
        w ← w − lr·b,   or with Nesterov momentum   w ← w − lr·(g + μ·b)

    This is `torch.optim.SGD`, with interchangeable state dicts. With dampening there is one more state, `step`, which
    torch ignores.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate; a float or a one-element tensor.
        momentum: μ ≥ 0; 0.9 averages over about ten steps. 0 keeps no state.
        dampening: d in [0, 1], the fraction of each new gradient that is left out.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        nesterov: Whether to use Nesterov momentum; requires momentum above 0 and dampening 0.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
        https://proceedings.mlr.press/v28/sutskever13.html

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8000, 0.8000, 0.8000])
    """

    when_to_use = "Convolutional networks, and wherever memory is short."
    memory = "1 value (0 without momentum)"
    paper = "https://proceedings.mlr.press/v28/sutskever13.html"
    usual_lr = (1e-3, 1.0)
    ranges: ClassVar[Mapping[str, Range]] = {
        "momentum": NON_NEGATIVE,
        "dampening": Range(0, 1),
    }
    option_defaults: ClassVar[SharedOptions] = {"weight_decay_kind": "l2"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            given = f"momentum={group['momentum']}, dampening={group['dampening']}"
            raise ValueError(f"SGD: nesterov=True needs momentum above 0 and dampening=0, not {given}.")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        if group["momentum"] == 0:
            return SGDRule()
        if group["nesterov"]:
            return NesterovRule()
        return DampenedRule() if group["dampening"] else MomentumRule()
