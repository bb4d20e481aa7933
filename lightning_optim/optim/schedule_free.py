"""Schedule-Free AdamW: an average of the weights instead of a learning rate schedule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range
from lightning_optim.core.sharding import local
from lightning_optim.kernels.corrections import weights_of
from lightning_optim.kernels.rules import Rule, Scalar, UpdateRule, maximum, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import decay_form, group_decay
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.low_precision import HALF
from lightning_optim.optim.moments import update_second_moment
from lightning_optim.optim.shared_options import SharedOptions


class ScheduleFreeAdamWRule(UpdateRule):
    """Update of z by Adam's step without momentum, and of y towards z; the average x is not stored."""

    state: ClassVar[tuple[str, ...]] = ("z", "exp_avg_sq")
    scalar_state: ClassVar[Mapping[str, float]] = MappingProxyType({"weight_sum": 0.0, "lr_max": 0.0})
    second_moment = "exp_avg_sq"
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg_sq": False}  # z has weights and needs full precision.
    decays_beside = False

    set_aside: ClassVar[tuple[str, ...]] = ("y",)

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        """Return the initial z, which is the weights like that of x and y."""
        return {"z": param}

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """Coefficients without c, because decay acts on z as well and is part of `update`."""
        return 0.0, usual[1]

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The warmed-up learning rate, and the weight of this step in the average."""
        beta1, beta2 = group["betas"]
        lr = group["lr"] * minimum(step / max(1, group["warmup_steps"]), 1.0)
        lr_max = maximum(lr, scalar_state["lr_max"])
        weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = scalar_state["weight_sum"] + weight
        share = weight / where(weight_sum > 0, weight_sum, 1.0)  # The sum is 0 while all lr were 0.
        own_decay, _ = group_decay(dict(group) | {"lr": lr})
        return {
            "lr": lr,
            "own_decay": own_decay,
            "share": share,
            "y_step": 1 - beta1 * (1 - share),
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": sqrt(1 - beta2**step),
            "eps": group["eps"],
            "weight_sum": weight_sum,
            "lr_max": lr_max,
        }

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        z: Any,
        exp_avg_sq: Any,
        lr: Any,
        own_decay: Any,
        share: Any,
        y_step: Any,
        beta2: Any,
        one_minus_beta2: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg_sq = update_second_moment(grad, exp_avg_sq, beta2, one_minus_beta2)
        change = lr * grad / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps) + own_decay * param
        return share * (param - z) + y_step * change, z - change, exp_avg_sq


class InnerMomentumRule(ScheduleFreeAdamWRule):
    """Schedule-Free update with Adam's first moment in the step of z."""

    state = ("z", "exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    first_moment = "exp_avg"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Scalars of `ScheduleFreeAdamWRule`, and those of the first moment."""
        beta = group["inner_momentum"]
        own = {"beta_z": beta, "one_minus_beta_z": 1 - beta, "bias_correction_z": 1 - beta**step}
        return super().scalars(group, step, **scalar_state) | own

    @staticmethod
    def update(  # type: ignore[override]
        param: Any,
        grad: Any,
        z: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        lr: Any,
        own_decay: Any,
        share: Any,
        y_step: Any,
        beta_z: Any,
        one_minus_beta_z: Any,
        bias_correction_z: Any,
        beta2: Any,
        one_minus_beta2: Any,
        bias_correction2_sqrt: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg = beta_z * exp_avg + one_minus_beta_z * grad
        exp_avg_sq = update_second_moment(grad, exp_avg_sq, beta2, one_minus_beta2)
        step = lr * exp_avg / bias_correction_z
        change = step / (sqrt(exp_avg_sq) / bias_correction2_sqrt + eps) + own_decay * param
        return share * (param - z) + y_step * change, z - change, exp_avg, exp_avg_sq


class ScheduleFreeAdamW(FusedOptimizer):
    """Schedule-Free AdamW: a constant learning rate, with weights as good as after a schedule at any time.

    There are three sequences: z takes AdamW's steps without momentum, x is the average of z, and gradients are computed
    at y between the two. During training the parameters are y; validate, save and deploy x:

        v ← β₂·v + (1 − β₂)·g²,   ĝ = g/(√(v/(1 − β₂ᵗ)) + ε) + λ·y
        c = ω/Σω  with  ω = tʳ·(largest lr so far)^p
        y ← (1 − c)·y + c·z − lr·(1 − β₁·(1 − c))·ĝ
        z ← z − lr·ĝ
        x = y + (1 − 1/β₁)·(z − y)

    This is `schedulefree.AdamWScheduleFree` of the paper's authors, except that step counts and Σω are stored per
    parameter, not per group. Call `eval` before validation and saving, and `train` before training continues, which
    restores y bit for bit; in Lightning the callback `ScheduleFree` does both. Do not use a schedule in addition. The
    running statistics of batch normalisation are those of y, so recompute them at x before using them. `cautious` is
    not offered, because x would no longer be the average of z; ``weight_decay_kind`` must be `decoupled`,
    `independent`, `corrected` or `l2`; ``state_bits`` applies to moments only, because z has weights.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step of z; 1 to 10 times that of AdamW with a schedule.
        betas: (β₁, β₂): β₁ in (0, 1) places y between z and x, 0.95 or 0.98 for very long runs; β₂ is as in AdamW.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0, evaluated at y; its meaning is ``weight_decay_kind``.
        warmup_steps: Steps over which lr rises linearly; 0 for none. A warmup is still recommended.
        r: Exponent ≥ 0 of t in the weights ω of the average; values above 0 forget early steps faster.
        weight_lr_power: Exponent p of lr in ω, which reduces the weight of warmup steps.
        inner_momentum: Adam's own β₁ in the step of z, in [0, 1), with m̂ instead of g in ĝ; it differs from the β₁ that
            places y, and needs one more state. This is ``schedulefree.ScheduleFreeWrapper`` around AdamW, with its
            decay at y.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = ScheduleFreeAdamW([weight], lr=0.1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight.data
        tensor([0.8480, 0.8480, 0.8480])
        >>> optimizer.eval()
        >>> weight.data
        tensor([0.8527, 0.8527, 0.8527])
        >>> optimizer.train()
    """

    when_to_use = "Runs of unknown length, and wherever tuning a schedule is too much effort."
    memory = "2 values (3 in evaluation mode; 1 more with inner_momentum)"
    paper = "https://arxiv.org/abs/2405.15682"
    usual_lr = (1e-4, 1e-2)
    refused_options: ClassVar[Mapping[str, str]] = {
        "cautious": "x would no longer be the average of z",
        "ema": "it is evaluated at an average of its own, x",
    }
    ranges: ClassVar[Mapping[str, Range]] = {
        "warmup_steps": NON_NEGATIVE,
        "r": NON_NEGATIVE,
        "weight_lr_power": NON_NEGATIVE,
        "inner_momentum": FRACTION,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        inner_momentum: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "inner_momentum": inner_momentum,
                "train_mode": True,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        if not group["betas"][0]:
            raise ValueError("ScheduleFreeAdamW: Invalid betas[0]=0: must be 0 < betas[0] < 1, because it places y.")
        if decay_form(group) != "shrink":
            raise ValueError(
                f"ScheduleFreeAdamW: weight_decay_kind={group['weight_decay_kind']!r} is not offered, because decay "
                "must act on the sequence z as well; it must be decoupled, independent, corrected or l2."
            )
        if group.get("rule") is not None:
            raise ValueError(
                "ScheduleFreeAdamW cannot be the rule of a group in another optimizer, which has no eval() and train()."
                " Make it the optimizer, and give other groups a 'rule'."
            )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return InnerMomentumRule() if group["inner_momentum"] else ScheduleFreeAdamWRule()

    def _prepare(self, group: dict[str, Any], rule: Rule, *, count: bool) -> None:
        if group.get("rule") is None and not group["train_mode"]:
            raise RuntimeError(
                "ScheduleFreeAdamW: a step in evaluation mode would start from the averaged weights. Call "
                "optimizer.train() first; in Lightning, the callback ScheduleFree does this."
            )
        super()._prepare(group, rule, count=count)

    @torch.no_grad()
    def eval(self) -> None:
        """Set the parameters to x, the average; y is stored as state, so that a checkpoint in this mode is complete.

        In evaluation mode this does nothing, and likewise for parameters without a step so far, where x equals y.
        """
        for group in self.param_groups:
            if group["train_mode"]:
                group["train_mode"] = False
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "z" in state:
                        state["y"] = param.detach().clone(memory_format=torch.preserve_format)
                        here, z = local(param), local(state["z"])
                        compensated = "kahan_comp" in state and here.dtype in HALF
                        wide = weights_of(here, local(state["kahan_comp"])) if compensated else here.to(z.dtype)
                        here.copy_(torch.lerp(wide, z, 1 - 1 / group["betas"][0]))

    @torch.no_grad()
    def train(self) -> None:
        """Restore the parameters to y, bit for bit; in training mode this does nothing.

        A distributed checkpoint that was loaded may lack y, because such checkpoints load the state that a new
        optimizer has. It is then computed from x and z, with a warning, and has a rounding error.
        """
        computed = False
        for group in self.param_groups:
            if not group["train_mode"]:
                group["train_mode"] = True
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "y" in state:
                        param.copy_(state.pop("y"))
                    elif "z" in state:
                        computed = True
                        y = torch.lerp(state["z"], param.to(state["z"].dtype), group["betas"][0])
                        param.copy_(y - state["kahan_comp"] if "kahan_comp" in state else y)
        if computed:
            warnings.warn(
                "ScheduleFreeAdamW: the state that was loaded has averaged weights without the weights of training, as "
                "in a distributed checkpoint. They have been computed from it, with rounding errors. A checkpoint in "
                "one file (save_distributed_checkpoint=False) continues bit for bit.",
                stacklevel=2,
            )
