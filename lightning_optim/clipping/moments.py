"""Rules that compare the gradient of each tensor with the optimizer's moments."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_optim.clipping.base import STATELESS, Clip, ClipRule, State, above_zero, gather, scatter, whole
from lightning_optim.core.stats import GradStats
from lightning_optim.core.transfer import upload
from lightning_optim.core.typed import typed


class _Released(ClipRule):
    """Base class of limits per tensor that are suspended for a tensor which exceeds its limit too often in a row."""

    per_parameter = ("flags",)
    spans = "tensor"

    def __init__(self, patience: int) -> None:
        self.patience = whole("patience", patience, 1, 16)

    @abstractmethod
    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return the divisors before any limit is suspended, at least 1, shape [tensors]."""

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return counters of consecutive steps in which each gradient was above its limit, up to ``patience``."""
        return {"flags": torch.zeros(parameters, dtype=torch.int64, device="cpu")}

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of each tensor, at least 1, shape [tensors]."""
        return torch.where(gather(state["flags"], stats) < self.patience, self.divisors(stats, state, limit), 1.0)

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Count consecutive steps above the limit; restart at 0 below it."""
        above = self.divisors(stats, state, 1.0) > 1
        flags = torch.where(above, gather(state["flags"], stats) + 1, 0).clamp(max=self.patience)
        return {"flags": scatter(state["flags"], stats, flags)}


@typed
class MomentumRatio(_Released):
    """Limit the norm of each tensor's gradient to ``ratio`` times that of the optimizer's momentum.

    The divisor of a tensor is max(1, ‖g‖ / (ratio · ‖m‖)), with the first moment m as it is before the step; a
    momentum buffer of SGD is rescaled to the average of which it is a multiple. The first moment is read once.

    With β₁ = 0.9 and gradients of pure noise, ‖m‖ is 0.23 ‖g‖, so that a ratio below 5 would make m smaller and
    smaller. Therefore the default is 10, and a tensor clipped ``patience`` times in a row is not clipped until its
    momentum has reached the new level.

    Args:
        ratio: Largest ratio of the norms of gradient and momentum, above 0.
        warmup: Number of steps without clipping, while moments are close to 0; skipped steps are not counted.
        patience: Number of consecutive clipped steps after which the new level is adopted.

    Raises:
        ValueError: An argument is out of range; at the second step, if the optimizer keeps no first moment.

    References:
        OLMo's adaptive clipping (Groeneveld et al., 2024, https://arxiv.org/abs/2402.00838), whose code compares with
        an average of norms instead of the norm of the average.
    """

    def __init__(self, ratio: float = 10.0, warmup: int = 20, patience: int = 16) -> None:
        super().__init__(patience)
        self.ratio = above_zero("ratio", ratio, 10.0)
        self.warmup = whole("warmup", warmup, 1, 20)

    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return divisors, above 1 where the gradient is too large compared with a non-zero momentum, [tensors]."""
        bound = stats.momentum_norm_sq.sqrt() * (self.ratio * limit)
        passes = (bound == 0) | (state["steps"] < self.warmup)
        return torch.where(passes, 1.0, (stats.norm_sq.sqrt() / bound).clamp(min=1.0))


@typed
class UpdateRMS(_Released):
    """Limit, tensor by tensor, the root mean square of g/√v̂, which is about 1 when the second moment is up to date.

    The divisor of a tensor is max(1, RMS(g / max(√v̂, ε)) / max_rms), with v̂ as Adam would have it after this step. A
    gradient much larger than recent ones (the usual cause of loss spikes) is reduced to their size.

    Adafactor and StableAdamW divide the learning rate by the same number, and the whole gradient enters the moments.
    Here the divided gradient enters them, so that v would follow a new level only slowly; therefore a tensor clipped
    ``patience`` times in a row is not clipped until v has reached the new level. For their method, use
    `lightning_optim.optim.StableAdamW`. The rule reads v in addition to the gradients.

    Args:
        max_rms: d, above 0; 1.0 in both papers.
        patience: Number of consecutive clipped steps after which the new level is adopted.

    Raises:
        ValueError: An argument is out of range; at the second step, if the optimizer is not of the Adam family, with
            ``betas``, ``eps``, ``step`` and ``exp_avg_sq``.

    References:
        Wortsman et al., Stable and low-precision training, 2023, https://arxiv.org/abs/2304.13013; Shazeer & Stern,
        Adafactor, 2018, https://arxiv.org/abs/1804.04235
    """

    def __init__(self, max_rms: float = 1.0, patience: int = 16) -> None:
        super().__init__(patience)
        self.max_rms = above_zero("max_rms", max_rms, 1.0)

    def divisors(self, stats: GradStats, state: State, limit: float) -> Tensor:
        """Return divisors, above 1 where the gradient is too large compared with the second moment, [tensors]."""
        sums = stats.grad_sq_over_exp_avg_sq
        numel = upload([max(n, 1) for n in stats.numel], sums.device, sums.dtype)
        return ((sums / numel).sqrt() / (self.max_rms * limit)).clamp(min=1.0)
