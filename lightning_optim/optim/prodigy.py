"""Prodigy: Adam that finds its own learning rate."""

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
    """Adam over d·g, with d the largest lower bound so far of the distance from the start to the solution."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "s", "p0")
    counts_steps: ClassVar[bool] = False  # `k` counts, once for all parameters
    first_moment: ClassVar[str | None] = "exp_avg"
    sums: ClassVar[tuple[str, ...]] = ("progress", "s_abs")
    shared: ClassVar[tuple[str, ...]] = ("d", "d_max", "d_numerator", "k")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Where the parameter started."""
        return {"p0": param.detach().clone(memory_format=torch.preserve_format)}

    def init_shared(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The smallest d to start from, and no steps taken."""
        return {"d": group["d0"], "d_max": group["d0"], "d_numerator": 0.0, "k": 0.0}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Betas, and the learning rate times d as it was before this step; at a rate of 0 nothing moves or counts."""
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
        """Decay follows the learning rate found, except the kind that follows none."""
        decay, l2 = usual
        if WeightDecayKind(group["weight_decay_kind"]) in (WeightDecayKind.INDEPENDENT, WeightDecayKind.NORM):
            return decay, l2  # no part of them is a step size
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
        """How far the gradient says we have come, and |s| with the new s; 0 of what is frozen, whatever it holds."""
        progress = progress_weight * grad * (p0 - param)
        s_abs = absolute(beta3 * s + s_weight * grad)
        return where(moves > zero, progress, zero), where(moves > zero, s_abs, zero)

    def share(self, group: Mapping[str, Any], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new d, from progress and path over all parameters that are not frozen."""
        d, d_max = group["d"], group["d_max"]
        numerator = _beta3(group) * group["d_numerator"] + sums["progress"]
        estimate = group["d_coef"] * numerator / sums["s_abs"]
        new_d = where(d == group["d0"], maximum(d, estimate), d)
        new_d_max = maximum(d_max, estimate)
        new_d = minimum(new_d_max, new_d * group["growth_rate"])
        new = {"d": new_d, "d_max": new_d_max, "d_numerator": numerator, "k": group["k"] + 1}
        # No gradient so far, or all rates 0: no estimate, and no step of the ones that bias correction counts.
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
    """Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1 and use any schedule.

    d, one number for all parameters, is the largest lower bound so far of the distance from the start w₀ to the
    solution. With gradient g, γ = d·lr (times Adam's bias corrections with ``use_bias_correction``), and the old d:

        m ← β₁·m + (1 − β₁)·d·g,   v ← β₂·v + (1 − β₂)·d²·g²
        r ← β₃·r + d/d₀·γ·⟨g, w₀ − w⟩,   s ← β₃·s + d/d₀·γ·g
        d ← max(d, c·r/‖s‖₁)
        w ← (1 − γ·λ)·w
        w ← w − γ·m / (√v + d·ε), with the new d

    As Algorithm 4 of the paper and as `prodigyopt.Prodigy` (``slice_p`` aside). Groups may differ in lr: each then
    enters r and s with its own. `d` is a tensor in every parameter group, ``optimizer.param_groups[0]["d"]``, never
    read on the host here. Under FSDP2 it is that of the whole model; FSDP1's flat parameters are summed per rank only,
    so use FSDP2.

    A group whose lr is 0 is frozen: it enters neither r nor s, and its state waits. There ours differs from the
    authors' code, which steps such a group with the others' lr: its weights decay, and drift on old momentum. And the
    authors take betas, β₃, d_coef and growth_rate of all groups from the first; here only those of d (β₃ of r, d_coef,
    growth_rate) are the first group's.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate relative to the one found; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        beta3: β₃, the decay rate of r and s; None for √β₂.
        eps: ε, added to the denominator, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``, with γ for lr.
        use_bias_correction: Correct m and v for their start at zero; the authors advise it for diffusion models.
        safeguard_warmup: Leave lr out of s, which keeps d sound while a long warmup holds lr small.
        d0: The first d; rarely matters.
        d_coef: c; the way to make all steps larger or smaller: 0.5 or 2.
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

    when_to_use = "No learning rate to tune: fine-tuning, diffusion, first experiments."
    memory = "4 values"
    paper = "https://arxiv.org/abs/2306.06101"
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
        """See `FusedOptimizer.rule`."""
        return ProdigyRule()
