"""Prodigy: Adam that estimates its own learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range
from lightning_optim.kernels.rules import Scalar, UpdateRule, absolute, maximum, minimum, sqrt, where
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.shared_options import SharedOptions


class ProdigyRule(UpdateRule):
    """Adam's update for d·g, with d the largest lower bound so far of the distance from start to solution."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "s", "p0")
    # The sum of |s| estimates d, and the noise of fewer bits would raise it; p0 has weights.
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    counts_steps: ClassVar[bool] = False  # The shared value `k` counts steps for all parameters.
    first_moment: ClassVar[str | None] = "exp_avg"
    sums: ClassVar[tuple[str, ...]] = ("progress", "s_abs")
    shared: ClassVar[tuple[str, ...]] = ("d", "d_max", "d_numerator", "k")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a copy of the initial parameter."""
        return {"p0": param.detach().clone(memory_format=torch.preserve_format)}

    def init_shared(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the initial d, and a step count of 0."""
        return {"d": group["d0"], "d_max": group["d0"], "d_numerator": 0.0, "k": 0.0}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, and lr times d from before this step; with lr = 0 neither weights nor state change."""
        beta1, beta2 = group["betas"]
        d, step_size = group["d"], self._step_size(group)
        moving = group["lr"] != 0
        return {
            "step_size": step_size,
            "beta1": where(moving, beta1, 1.0),
            "grad_weight": where(moving, d * (1 - beta1), 0.0),
            "beta2": where(moving, beta2, 1.0),
            "grad_sq_weight": where(moving, d * d * (1 - beta2), 0.0),
            "beta3": where(moving, _beta3(group), 1.0),
            "s_weight": where(moving, d / group["d0"] * (d if group["safeguard_warmup"] else step_size), 0.0),
            "progress_weight": d / group["d0"] * step_size,
            "moves": where(moving, 1.0, 0.0),
            "zero": 0.0,
            "eps": group["eps"],
        }

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """Coefficients multiplied by d, except for kinds that do not depend on the size of lr."""
        decay, l2 = usual
        if WeightDecayKind(group["weight_decay_kind"]) in (WeightDecayKind.INDEPENDENT, WeightDecayKind.NORM):
            return decay, l2  # They do not scale with the step size.
        return decay * group["d"] * self._bias_correction(group), l2

    def _step_size(self, group: Mapping[str, Any]) -> Scalar:
        return group["d"] * group["lr"] * self._bias_correction(group)

    @staticmethod
    def _bias_correction(group: Mapping[str, Any]) -> Scalar:
        if not group["use_bias_correction"]:
            return 1.0
        beta1, beta2 = group["betas"]
        step = group["k"] + 1
        return sqrt(1 - beta2**step) / (1 - beta1**step)

    @staticmethod
    def sums_update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        s: Any,
        p0: Any,
        beta3: Any,
        s_weight: Any,
        progress_weight: Any,
        moves: Any,
        zero: Any,
    ) -> Any:
        """Terms of the progress estimate and of |s| with the new s; 0 for frozen groups, even if values are NaN."""
        progress = progress_weight * grad * (p0 - param)
        s_abs = absolute(beta3 * s + s_weight * grad)
        return where(moves > zero, progress, zero), where(moves > zero, s_abs, zero)

    def share(self, group: Mapping[str, Any], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the new d from the sums over all parameters that are not frozen."""
        d, d_max = group["d"], group["d_max"]
        numerator = _beta3(group) * group["d_numerator"] + sums["progress"]
        estimate = group["d_coef"] * numerator / sums["s_abs"]
        new_d = where(d == group["d0"], maximum(d, estimate), d)
        new_d_max = maximum(d_max, estimate)
        new_d = minimum(new_d_max, new_d * group["growth_rate"])
        new = {"d": new_d, "d_max": new_d_max, "d_numerator": numerator, "k": group["k"] + 1}
        # Without gradients so far, or with all lr = 0, there is no estimate, and the step is not counted.
        return {name: where(sums["s_abs"] != 0, value, group[name]) for name, value in new.items()}

    @staticmethod
    def update(
        param: Any,
        grad: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        s: Any,
        p0: Any,
        step_size: Any,
        beta1: Any,
        grad_weight: Any,
        beta2: Any,
        grad_sq_weight: Any,
        beta3: Any,
        s_weight: Any,
        new_d: Any,
        eps: Any,
    ) -> Any:
        """One element's step."""
        exp_avg = beta1 * exp_avg + grad_weight * grad
        exp_avg_sq = beta2 * exp_avg_sq + grad_sq_weight * grad * grad
        delta = step_size * exp_avg / (sqrt(exp_avg_sq) + new_d * eps)
        return delta, exp_avg, exp_avg_sq, beta3 * s + s_weight * grad, p0


def _beta3(group: Mapping[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else float(group["beta3"])


class Prodigy(FusedOptimizer):
    """Prodigy: Adam that estimates its own learning rate; leave ``lr`` at 1 and use any schedule.

    d, one number for all parameters, is the largest lower bound so far of the distance from the start w₀ to the
    solution. With gradient g, γ = d·lr (times Adam's bias corrections with ``use_bias_correction``), and the old d:

        m ← β₁·m + (1 − β₁)·d·g,   v ← β₂·v + (1 − β₂)·d²·g²
        r ← β₃·r + d/d₀·γ·⟨g, w₀ − w⟩,   s ← β₃·s + d/d₀·γ·g
        d ← max(d, c·r/‖s‖₁)
        w ← (1 − γ·λ)·w
        w ← w − γ·m / (√v + d·ε), with the new d

    This is Algorithm 4 of the paper and `prodigyopt.Prodigy` (without ``slice_p``). Groups may have different lr, with
    which they enter r and s. `d` is a tensor in every parameter group, ``optimizer.param_groups[0]["d"]``, and never
    read on the host. With FSDP2 it is that of the whole model; the flat parameters of FSDP1 are summed per rank only,
    so use FSDP2.

    A group with lr = 0 is frozen: it enters neither r nor s, and its state does not change. The authors' code instead
    updates such a group with the lr of the others, so that its weights decay and drift by old momentum. It also takes
    betas, β₃, d_coef and growth_rate of all groups from the first one; here only those of d (β₃ of r, d_coef,
    growth_rate) are taken from the first group.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate relative to the estimated one; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        beta3: β₃, the decay rate of r and s; None for √β₂.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``, with γ for lr.
        use_bias_correction: Whether to correct m and v for their start at zero, as advised for diffusion models.
        safeguard_warmup: Whether to leave lr out of s, which avoids a wrong d during a long warmup.
        d0: Initial d; it rarely matters.
        d_coef: c; 0.5 or 2 make all steps smaller or larger.
        growth_rate: Largest factor by which d may grow in one step; 1.02 acts as a warmup.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Mishchenko & Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner, 2023,
        https://arxiv.org/abs/2306.06101

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Prodigy([weight])
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.square().sum() < 1)
        True
    """

    when_to_use = "Training without tuning a learning rate: fine-tuning, diffusion, first experiments."
    memory = "4 values"
    paper = "https://arxiv.org/abs/2306.06101"
    usual_lr = (0.3, 3.0)
    ranges: ClassVar[Mapping[str, Range]] = {
        "beta3": replace(FRACTION, optional=True),
        "d0": Range(0, above=True, below=True),
        "d_coef": NON_NEGATIVE,
        "growth_rate": Range(1),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "beta3": beta3,
                "eps": eps,
                "weight_decay": weight_decay,
                "use_bias_correction": use_bias_correction,
                "safeguard_warmup": safeguard_warmup,
                "d0": d0,
                "d_coef": d_coef,
                "growth_rate": growth_rate,
            },
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Implement `FusedOptimizer.rule`."""
        return ProdigyRule()
