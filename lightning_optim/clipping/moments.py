"""Rules that compare a gradient with the optimizer's own moments, tensor by tensor."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_optim.clipping.base import STATELESS, Clip, ClipRule, State, above_zero, gather, scatter, whole
from lightning_optim.core.stats import GradStats
from lightning_optim.core.transfer import upload


class _Released(ClipRule):
    """A limit for each tensor that is lifted for one that is above it too often in a row, until it is below again."""

    per_parameter = ("flags",)

    def __init__(self, patience: int) -> None:
        self.patience = whole("patience", patience, 1, 16)

    @abstractmethod
    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return the divisors before any limit is lifted, at least 1, shape [tensors]."""

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return how often in a row each parameter's gradient has been above its limit, up to ``patience``."""
        return {"flags": torch.zeros(parameters, dtype=torch.int64, device="cpu")}

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of each tensor, at least 1, shape [tensors]."""
        return torch.where(gather(state["flags"], stats) < self.patience, self.divisors(stats, state, limit), 1.0)

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Count steps in a row above the limit; restart at 0 below it."""
        above = self.divisors(stats, state, 1.0) > 1
        flags = torch.where(above, gather(state["flags"], stats) + 1, 0).clamp(max=self.patience)
        return {"flags": scatter(state["flags"], stats, flags)}


class MomentumRatio(_Released):
    """Limit the norm of each tensor's gradient to ``ratio`` times that of the optimizer's momentum.

    The divisor of a tensor is max(1, ‖g‖ / (ratio · ‖m‖)), with the first moment m as it is before the step; a
    momentum buffer of SGD is taken as the average it is a multiple of. Costs a read of the first moment.

    With β₁ = 0.9 and gradients that are noise only, ‖m‖ is 0.23 ‖g‖: a ratio below 5 would shrink m further and
    further. So the default is 10, and a tensor clipped ``patience`` times in a row goes unclipped until its momentum
    has caught up.

    Args:
        ratio: How much larger than the momentum a gradient may be, above 0.
        warmup: Steps without clipping, while the moments still start from 0; skipped ones are not counted.
        patience: Number of clipped steps in a row after which the new level is adopted.

    Raises:
        ValueError: An argument is out of range; at the second step, if the optimizer keeps no first moment.

    References:
        OLMo's adaptive clipping (Groeneveld et al., 2024, https://arxiv.org/abs/2402.00838), whose code compares with
        an average of norms in place of the norm of the average.
    """

    def __init__(self, ratio: float = 10.0, warmup: int = 20, patience: int = 16) -> None:
        super().__init__(patience)
        self.ratio = above_zero("ratio", ratio, 10.0)
        self.warmup = whole("warmup", warmup, 1, 20)

    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return divisors above 1 where the gradient is too large against a momentum that exists, shape [tensors]."""
        bound = stats.momentum_norm_sq.sqrt() * (self.ratio * limit)
        passes = (bound == 0) | (state["steps"] < self.warmup)
        return torch.where(passes, 1.0, (stats.norm_sq.sqrt() / bound).clamp(min=1.0))


class UpdateRMS(_Released):
    """Limit, tensor by tensor, the root mean square of g/√v̂, which is about 1 when the second moment is up to date.

    The divisor of a tensor is max(1, RMS(g / max(√v̂, ε)) / max_rms), with v̂ as Adam would have it after this step. A
    gradient much larger than those that v remembers (the usual cause of loss spikes) is brought down to them.

    Adafactor and StableAdamW divide the learning rate by the same number, and let the gradient into the moments whole;
    here it enters them divided, so that v would follow a new level but slowly: a tensor clipped ``patience`` times in a
    row goes unclipped until v has caught up. For theirs, use `lightning_optim.optim.StableAdamW`. Costs a read of v,
    and some arithmetic in torch's operations, about as much as the update itself.

    Args:
        max_rms: d, above 0; 1.0 in both papers.
        patience: Number of clipped steps in a row after which the new level is adopted.

    Raises:
        ValueError: An argument is out of range; at the second step, if the optimizer is not of Adam's kind, with
            ``betas``, ``eps``, ``step`` and ``exp_avg_sq``.

    References:
        Wortsman et al., Stable and low-precision training, 2023, https://arxiv.org/abs/2304.13013; Shazeer & Stern,
        Adafactor, 2018, https://arxiv.org/abs/1804.04235
    """

    def __init__(self, max_rms: float = 1.0, patience: int = 16) -> None:
        super().__init__(patience)
        self.max_rms = above_zero("max_rms", max_rms, 1.0)

    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return divisors above 1 where the gradient is too large against the second moment, shape [tensors]."""
        sums = stats.grad_sq_over_exp_avg_sq
        numel = upload([max(n, 1) for n in stats.numel], sums.device, sums.dtype)
        return ((sums / numel).sqrt() / (self.max_rms * limit)).clamp(min=1.0)
