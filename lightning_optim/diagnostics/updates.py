"""Diagnostics of what the step did to the parameters, from the update's own sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.diagnostics.base import Diagnostic
from lightning_optim.stats import StepRecord
from lightning_optim.weight_decay import WeightDecayKind, decay_coefficients


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

    For the kinds that shrink weights in proportion (decoupled, independent, corrected). With the others it has no
    closed form: L2 is part of the gradient, cautious decay depends on signs.
    """

    name = "weight_decay/share"

    def compute(self, record: StepRecord) -> Tensor:
        """c·‖p‖ / ‖Δp‖ per group."""
        norms = (record.update.groups("param_sq") / record.update.groups("update_sq")).sqrt()
        shares = [_proportional_decay(group) * norm for group, norm in zip(record.hyperparameters, norms, strict=True)]
        return torch.stack([share.to(norms.device) for share in shares])


def _proportional_decay(group: Mapping[str, Any]) -> Any:
    """What fraction of a weight decays in the step; NaN where that is not what decay does."""
    decay, kind = group.get("weight_decay", 0), group.get("weight_decay_kind")
    if kind is None:  # an optimizer of torch's, or of others
        known = group.get("decoupled_weight_decay")
        return group["lr"] * decay if known else math.nan
    kind = WeightDecayKind.parse(kind)
    if kind is WeightDecayKind.L2 and group.get("decoupled_weight_decay"):
        kind = WeightDecayKind.DECOUPLED
    if kind not in (WeightDecayKind.DECOUPLED, WeightDecayKind.INDEPENDENT, WeightDecayKind.CORRECTED):
        return math.nan
    return decay_coefficients(kind, group["lr"], decay, group["peak_lr"])[0]
