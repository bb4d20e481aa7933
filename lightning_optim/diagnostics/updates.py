"""Diagnostics of what the step did to the parameters, from the update's own sums."""

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
        """‖p‖ per group."""
        return record.update.groups("param_sq").sqrt()


class ParamRMS(Diagnostic):
    """Root mean square of the parameters before the step, which compares groups of different sizes."""

    name = "param_norm/rms"

    def compute(self, record: StepRecord) -> Tensor:
        """√mean(p²) per group."""
        return record.update.means("param_sq").sqrt()


class UpdateNorm(Diagnostic):
    """Norm of the change of the parameters, weight decay included."""

    name = "update_norm"

    def compute(self, record: StepRecord) -> Tensor:
        """‖Δp‖ per group."""
        return record.update.groups("update_sq").sqrt()


class UpdateRatio(Diagnostic):
    """By what share of their norm the step changed the parameters; nothing where all of a group's parameters are zero.

    A rule of thumb for a healthy run is 1e-3 (Karpathy, CS231n notes); watch a group against its own history.
    """

    name = "update_ratio"

    def compute(self, record: StepRecord) -> Tensor:
        """‖Δp‖ / ‖p‖ per group."""
        ratio = (record.update.groups("update_sq") / record.update.groups("param_sq")).sqrt()
        return ratio.masked_fill(ratio.isinf(), math.nan)


class EffectiveLR(Diagnostic):
    """How far a weight moved: the root mean square of the changes of all weights of a group.

    What the learning rate came to, in one unit for all optimizers: 0.2 to 0.4 times lr with AdamW, lr itself with
    Lion, lr times the gradient with SGD.
    """

    name = "lr/effective"

    def compute(self, record: StepRecord) -> Tensor:
        """√mean(Δp²) per group."""
        return record.update.means("update_sq").sqrt()


class WeightDecayShare(Diagnostic):
    """Norm of what weight decay alone took off, over the norm of the whole change.

    Every kind has such a share but L2, which is part of the gradient and then of the moments; and in ScheduleFreeAdamW
    decay moves other sequences than the weights. Of other packages' optimizers it is known for torch's decoupled ones.
    It may be above 1 where decay and update point apart.
    """

    name = "weight_decay/share"

    def compute(self, record: StepRecord) -> Tensor:
        """‖decay‖ / ‖Δp‖ per group."""
        update_sq = record.update.groups("update_sq")
        shares = (record.update.groups("decay_sq") / update_sq).sqrt()
        factors = [_stated_decay(group) for group in record.hyperparameters]
        if all(factor is None for factor in factors):
            return shares
        ratios = (record.update.groups("param_sq") / update_sq).sqrt()
        rows = zip(shares.unbind(), ratios.unbind(), factors, strict=True)
        return torch.stack([share if factor is None else ratio * factor for share, ratio, factor in rows])


def _stated_decay(group: Mapping[str, Any]) -> Any:
    """Return what fraction of a weight decays; NaN if that is not known, None if the update has measured it."""
    kind, decoupled = group.get("weight_decay_kind"), group.get("decoupled_weight_decay")
    if kind is None:  # an optimizer of torch's, or of others
        return group["lr"] * group.get("weight_decay", 0) if decoupled else math.nan
    return math.nan if kind == WeightDecayKind.L2 and not decoupled else None
