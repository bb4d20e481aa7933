"""Diagnostics of the gradients, from sums that clipping and the update measure in their own passes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.core.stats import StepRecord, sum_groups
from lightning_optim.diagnostics.base import Diagnostic


class GradNorm(Diagnostic):
    """Norm of the gradients before clipping, without the loss scale of 16-bit training."""

    name = "grad_norm"
    has_total = True
    shows_nan = True

    def compute(self, record: StepRecord) -> Tensor:
        """‖g‖ per group, then over all, shape [groups + 1]."""
        return torch.cat([record.grad.group_norms(), record.grad.total_norm().reshape(1)])


class ClippedGradNorm(Diagnostic):
    """Norm of the gradients as the update used them."""

    name = "grad_norm_clipped"
    has_total = True
    shows_nan = True

    def compute(self, record: StepRecord) -> Tensor:
        """‖g‖ per group, then over all, shape [groups + 1]."""
        sums = sum_groups(record.clipped_norm_sq, record.grad.group_sizes)
        return torch.cat([sums, sums.sum().reshape(1)]).sqrt()


class ClipCoefficient(Diagnostic):
    """Norm of each group's gradients after clipping over that before it; 1 where clipping did nothing."""

    name = "grad_norm_clipped/coefficient"

    def compute(self, record: StepRecord) -> Tensor:
        """‖clipped g‖ / ‖g‖ per group, shape [groups]."""
        return sum_groups(record.clipped_norm_sq, record.grad.group_sizes).sqrt() / record.grad.group_norms()


class NonFinite(Diagnostic):
    """Number of gradients with a NaN or an infinity; a report names the first of them."""

    name = "health/nonfinite_gradients"
    per_group = False

    def compute(self, record: StepRecord) -> Tensor:
        """Number of tensors, shape [1]."""
        return (~record.grad.norm_sq.isfinite()).sum().reshape(1)


class ZeroGrad(Diagnostic):
    """Share of each group's weights whose gradient is exactly 0: dead units, unused rows, underflow in fp16."""

    name = "grad/zero"

    def compute(self, record: StepRecord) -> Tensor:
        """Mean of [g = 0] per group, shape [groups]."""
        return record.update.means("zero_grad")


class GradCosine(Diagnostic):
    """Cosine between the gradient and the momentum as it was before the step.

    Near 1 the steps keep one direction and could be longer; below 0 they overshoot. It exists for optimizers that keep
    a first moment, from their second step on.
    """

    name = "grad/cosine"

    def compute(self, record: StepRecord) -> Tensor:
        """g·m / (‖g‖·‖m‖) per group, shape [groups]."""
        grad_sq = sum_groups(record.clipped_norm_sq, record.grad.group_sizes)
        return record.update.groups("grad_exp_avg") / (grad_sq * record.update.groups("momentum_sq")).sqrt()


class GradOverSecondMoment(Diagnostic):
    """Root mean square of the gradient over the root of its second moment; about 1 while gradients keep their size.

    It rises some steps before a spike of the loss, because the second moment lags behind the gradients (Wortsman et
    al., Stable and low-precision training, 2023, https://arxiv.org/abs/2304.13013, who call it RMS).
    """

    name = "grad/over_second_moment"

    def compute(self, record: StepRecord) -> Tensor:
        """√mean(g²/v̂) per group, shape [groups]."""
        return record.update.means("grad_sq_over_exp_avg_sq").sqrt()


class BelowEps(Diagnostic):
    """Share of each group's weights whose √v̂ is below the optimizer's eps, which then determines their step."""

    name = "grad/below_eps"

    def compute(self, record: StepRecord) -> Tensor:
        """Mean of [√v̂ < eps] per group, shape [groups]."""
        return record.update.means("below_eps")
