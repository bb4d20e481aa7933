"""Schedule-Free AdamW: an average of the weights takes the place of a learning rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Rule, Scalar, UpdateRule, maximum, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import decay_form, group_decay
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.moments import update_second_moment
from lightning_optim.optim.shared_options import SharedOptions


class ScheduleFreeAdamWRule(UpdateRule):
    """Moves z by Adam's step without momentum, and y towards z; their average x is never stored."""

    state: ClassVar[tuple[str, ...]] = ("z", "exp_avg_sq")
    scalar_state: ClassVar[Mapping[str, float]] = MappingProxyType({"weight_sum": 0.0, "lr_max": 0.0})
    second_moment = "exp_avg_sq"
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg_sq": False}  # z is weights, and stays wide
    decays_beside = False

    set_aside: ClassVar[tuple[str, ...]] = ("y",)

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        """All three sequences start at the weights."""
        return {"z": param}

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """Decay moves z as well, so it is part of `update`."""
        return 0.0, usual[1]

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The warmed-up learning rate, and the weight of this step in the average."""
        beta1, beta2 = group["betas"]
        lr = group["lr"] * minimum(step / max(1, group["warmup_steps"]), 1.0)
        lr_max = maximum(lr, scalar_state["lr_max"])
        weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = scalar_state["weight_sum"] + weight
        share = weight / where(weight_sum > 0, weight_sum, 1.0)  # all rates 0 so far: nothing to average
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
    """The same with Adam's first moment in z's step."""

    state = ("z", "exp_avg", "exp_avg_sq")
    first_moment = "exp_avg"

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Those of `ScheduleFreeAdamWRule`, and the first moment's."""
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
    """Schedule-Free AdamW: a constant learning rate, and weights as good as after a schedule at any time.

    Three sequences: z takes AdamW's steps without momentum, x is the average of z, and gradients are taken at y between
    the two. While training the parameters are y; what to validate, save and deploy is x:

        v ← β₂·v + (1 − β₂)·g²,   ĝ = g/(√(v/(1 − β₂ᵗ)) + ε) + λ·y
        c = ω/Σω  with  ω = tʳ·(largest lr so far)^p
        y ← (1 − c)·y + c·z − lr·(1 − β₁·(1 − c))·ĝ
        z ← z − lr·ĝ
        x = y + (1 − 1/β₁)·(z − y)

    As `schedulefree.AdamWScheduleFree`, of the paper's authors; step counts and Σω are kept per parameter, not per
    group. Call `eval` before validation and saving, and `train` before going on, which restores y bit for bit; in
    Lightning the callback `ScheduleFree` does. Use no schedule in addition. Batch norm's running statistics are
    those of y: recompute them at x before they matter. `cautious` is not offered, because x would no longer be the
    average of z; ``weight_decay_kind`` is `decoupled`, `independent`, `corrected` or `l2`; with ``state_bits`` v
    has fewer bits, and z, being weights, keeps 32.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step of z; 1 to 10 times what AdamW has with a schedule.
        betas: (β₁, β₂): β₁ in (0, 1) places y between z and x, 0.95 or 0.98 for very long runs; β₂ as AdamW's.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0, acting at y; its meaning is ``weight_decay_kind``.
        warmup_steps: Steps over which lr rises linearly; 0 for none. Warmup is still worth having.
        r: Exponent ≥ 0 of t in the weights ω of the average; above 0 it forgets early steps faster.
        weight_lr_power: Exponent p of lr in ω, so that steps of the warmup weigh less.
        inner_momentum: In [0, 1): Adam's own β₁ in the step of z, m̂ in place of g in ĝ; not the β₁ that places y.
            One more value per parameter; ``schedulefree.ScheduleFreeWrapper`` around AdamW, with its decay at y.
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

    when_to_use = "Runs of open length, and wherever a schedule is one thing too many to tune."
    memory = "2 values (3 in evaluation mode; 1 more with inner_momentum)"
    paper = "https://arxiv.org/abs/2405.15682"
    refused_options: ClassVar[Mapping[str, str]] = {"cautious": "x would no longer be the average of z"}
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
        """See `FusedOptimizer.check`."""
        if not group["betas"][0]:
            raise ValueError("ScheduleFreeAdamW: betas[0]=0 leaves no average; needed is 0 < betas[0] < 1.")
        if decay_form(group) != "shrink":
            raise ValueError(
                f"ScheduleFreeAdamW: weight_decay_kind={group['weight_decay_kind']!r} is not offered, because decay "
                "has to move the sequence z along; needed is decoupled, independent, corrected or l2."
            )
        if group.get("rule") is not None:
            raise ValueError(
                "ScheduleFreeAdamW cannot be the rule of a group in another optimizer, which has no eval() and train()."
                " Make it the optimizer, and give other groups a 'rule'."
            )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """See `FusedOptimizer.rule`."""
        return InnerMomentumRule() if group["inner_momentum"] else ScheduleFreeAdamWRule()

    def _prepare(self, group: dict[str, Any], rule: Rule, *, count: bool) -> None:
        if group.get("rule") is None and not group["train_mode"]:
            raise RuntimeError(
                "ScheduleFreeAdamW: a step in evaluation mode would start from the averaged weights. Call "
                "optimizer.train() first; in Lightning, the callback ScheduleFree does."
            )
        super()._prepare(group, rule, count=count)

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters x, the average; y is set aside as state, so a checkpoint taken now loses nothing.

        Nothing happens in evaluation mode, or to parameters that have not been stepped yet (x and y are one there).
        """
        for group in self.param_groups:
            if group["train_mode"]:
                group["train_mode"] = False
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "z" in state:
                        state["y"] = param.detach().clone(memory_format=torch.preserve_format)
                        wide = param.to(state["z"].dtype)
                        if "kahan_comp" in state:
                            wide = wide + state["kahan_comp"]
                        param.copy_(torch.lerp(wide, state["z"], 1 - 1 / group["betas"][0]))

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters y again, bit for bit what they were. Nothing happens in training mode."""
        for group in self.param_groups:
            if not group["train_mode"]:
                group["train_mode"] = True
                for param in group["params"]:
                    state = self.state.get(param, {})
                    if "y" in state:
                        param.copy_(state.pop("y"))
