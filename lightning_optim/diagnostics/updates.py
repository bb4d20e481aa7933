"""Diagnostics of the effect of a step on the parameters, from sums that the update collects in its own pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.stats import StepRecord
from lightning_optim.diagnostics.base import Diagnostic
from lightning_optim.kernels.weight_decay import WeightDecayKind


class ParamNorm(Diagnostic):
    """Norm of the parameters before the step."""

    name = "param_norm"

    def compute(self, record: StepRecord) -> Tensor:
        """‖p‖ per group, shape [groups]."""
        return record.update.groups("param_sq").sqrt()


class ParamRMS(Diagnostic):
    """Root mean square of the parameters before the step, which is comparable between groups of different sizes."""

    name = "param_norm/rms"

    def compute(self, record: StepRecord) -> Tensor:
        """√mean(p²) per group, shape [groups]."""
        return record.update.means("param_sq").sqrt()


class UpdateNorm(Diagnostic):
    """Norm of the change of the parameters, weight decay included."""

    name = "update_norm"

    def compute(self, record: StepRecord) -> Tensor:
        """‖Δp‖ per group, shape [groups]."""
        return record.update.groups("update_sq").sqrt()


class UpdateRatio(Diagnostic):
    """Norm of the change of the parameters over their norm; not defined for a group whose parameters are all zero.

    A rule of thumb for a healthy run is 1e-3 (Karpathy, CS231n notes); compare a group with its own history.
    """

    name = "update_ratio"

    def compute(self, record: StepRecord) -> Tensor:
        """‖Δp‖ / ‖p‖ per group, shape [groups]."""
        ratio = (record.update.groups("update_sq") / record.update.groups("param_sq")).sqrt()
        return ratio.masked_fill(ratio.isinf(), math.nan)


class EffectiveLR(Diagnostic):
    """Effective learning rate: the root mean square of the changes of all weights of a group.

    It has the same unit for all optimizers: it is 0.2 to 0.4 times lr with AdamW, lr itself with Lion, and lr times the
    gradient with SGD.
    """

    name = "lr/effective"

    def compute(self, record: StepRecord) -> Tensor:
        """√mean(Δp²) per group, shape [groups]."""
        return record.update.means("update_sq").sqrt()


class WeightDecayShare(Diagnostic):
    """Norm of the change by weight decay alone, over the norm of the whole change.

    It is defined for every kind except L2, which is part of the gradient and then of the moments, and not for
    ScheduleFreeAdamW, where decay moves sequences other than the weights. Among the optimizers of other packages it is
    known for torch's decoupled ones. It may be above 1 where decay and update have opposite directions.
    """

    name = "weight_decay/share"

    def compute(self, record: StepRecord) -> Tensor:
        """‖decay‖ / ‖Δp‖ per group, shape [groups]."""
        update_sq = record.update.groups("update_sq")
        shares = (record.update.groups("decay_sq") / update_sq).sqrt()
        factors = [_stated_decay(group) for group in record.hyperparameters]
        if all(factor is None for factor in factors):
            return shares
        ratios = (record.update.groups("param_sq") / update_sq).sqrt()
        rows = zip(shares.unbind(), ratios.unbind(), factors, strict=True)
        return torch.stack([share if factor is None else ratio * factor for share, ratio, factor in rows])


def _stated_decay(group: Mapping[str, Any]) -> Any:
    """Return the fraction of a weight that decays; NaN if it is not known, None if the update has measured it."""
    kind, decoupled = group.get("weight_decay_kind"), group.get("decoupled_weight_decay")
    if kind is None:  # The optimizer is torch's or another package's.
        return group["lr"] * group.get("weight_decay", 0) if decoupled else math.nan
    return math.nan if kind == WeightDecayKind.L2 and not decoupled else None
