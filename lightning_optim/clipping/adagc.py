from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.clipping.base import STATELESS, Clip, ClipRule, Divisor, State, above_zero, gather, scatter, whole
from lightning_optim.core.fragment import NUMBER, PARAMETER, Fragment
from lightning_optim.core.stats import GradStats
from lightning_optim.core.typed import typed


@typed
class AdaGC(ClipRule):
    """Limit the norm of each tensor's gradient to a little above its own average so far.

    For the first ``warmup`` steps gradients are clipped by their global norm, and each tensor's smallest clipped norm
    is noted:

        ĝ = g / max(1, ‖g‖ / max_norm),   γᵢ ← min(γᵢ, ‖ĝᵢ‖)

    From then on each tensor has its own limit, and γ is an average of clipped norms:

        ĝᵢ = gᵢ / max(1, ‖gᵢ‖ / (ratio · γᵢ)),   γᵢ ← β · γᵢ + (1 − β) · ‖ĝᵢ‖

    If a tensor is clipped ``patience`` times in a row, γᵢ is set to its norm, the new level. (Otherwise γ grows by at
    most a thousandth per step, so that a layer that has just been unfrozen would be clipped for hundreds of steps.)

    Args:
        max_norm: Limit on the global norm during the warmup, above 0.
        ratio: Largest ratio of a norm to γ, at least 1.
        beta: β, the decay rate of the average, in [0, 1).
        warmup: Number of steps with the global limit; skipped steps are not counted.
        patience: Number of clipped steps in a row after which the new level is adopted; None for never, as in the
            paper.

    Raises:
        ValueError: An argument is out of range.

    References:
        Wang et al., AdaGC, 2025, https://arxiv.org/abs/2502.11034
    """

    per_parameter = ("gamma", "flags")
    spans = "norm"

    def __init__(
        self,
        max_norm: float = 1.0,
        ratio: float = 1.05,
        beta: float = 0.98,
        warmup: int = 100,
        patience: int | None = 16,
    ) -> None:
        self.max_norm = above_zero("max_norm", max_norm, 1.0)
        self.ratio = above_zero("ratio", ratio, 1.05)
        if self.ratio < 1:
            raise ValueError(
                f"Invalid ratio={ratio!r}: it must be at least 1, because below 1 every step would be clipped."
            )
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta={beta!r}: it must be in [0, 1), for instance 0.98.")
        self.beta = float(beta)
        self.warmup = whole("warmup", warmup, 1, 100)
        self.patience = None if patience is None else whole("patience", patience, 1, 16)

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return each parameter's γ, infinite before its first gradient, and how often in a row it was clipped."""
        return {
            "gamma": torch.full((parameters,), torch.inf, device="cpu"),
            "flags": torch.zeros(parameters, dtype=torch.int64, device="cpu"),
        }

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of each tensor, at least 1, shape [tensors]."""
        norms = stats.norm_sq.sqrt()
        together = (stats.total_norm() / (self.max_norm * limit)).clamp(min=1.0)
        own = (norms / (self.ratio * limit * gather(state["gamma"], stats))).clamp(min=1.0)
        return torch.where(state["steps"] < self.warmup, together.expand_as(own), own)

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Return γ after this step, and how often in a row each parameter was clipped."""
        assert isinstance(clip, Divisor)
        norms = stats.norm_sq.sqrt()
        clipped = norms / clip.values
        gamma = gather(state["gamma"], stats)
        warming = state["steps"] < self.warmup
        average = torch.where(gamma.isinf(), clipped, self.beta * gamma + (1 - self.beta) * clipped)
        new = torch.where(warming, torch.minimum(gamma, clipped), average)
        flags = torch.where((clip.values > 1) & ~warming, gather(state["flags"], stats) + 1, 0)
        if self.patience is not None:
            moved = flags >= self.patience
            new, flags = torch.where(moved, norms, new), torch.where(moved, 0, flags)
        # A gradient of zeros does not set the level, because γ = 0 would clip all later gradients to 0.
        new = torch.where(norms > 0, new, gamma)
        return {"gamma": scatter(state["gamma"], stats, new), "flags": scatter(state["flags"], stats, flags)}

    per_tensor = True

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision and the next levels as lines of a program."""
        patience = "infinity" if self.patience is None else float(self.patience)
        lines = (
            "norms = sqrt(norm_sq)",
            f"warming = steps < {float(self.warmup)}",
            "divisor = where(warming, maximum(norm / bound, 1.0), maximum(norms / (ratio * gamma), 1.0))",
            "clipped = some(has & (divisor > 1.0))",
            "after = norms / divisor",
            f"average = where(gamma == infinity, after, {self.beta} * gamma + {1 - self.beta} * after)",
            "level = where(warming, minimum(gamma, after), average)",
            "new_flags = where((divisor > 1.0) & negation(warming), flags + 1.0, 0.0)",
            f"moved = new_flags >= {patience}",
            "level = where(moved, norms, level)",
            "new_flags = where(moved, 0.0, new_flags)",
            "new_gamma = where(norms > 0.0, level, gamma)",
            "new_steps = steps + 1.0",
        )
        return Fragment(lines, ("bound", "ratio"), (), (("gamma", PARAMETER), ("flags", PARAMETER), ("steps", NUMBER)))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the limit during the warmup, and the ratio after it."""
        return self.max_norm * limit, self.ratio * limit
