"""Rules whose limit on the global norm depends on recent norms, by a percentile or a robust z-score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.clipping.base import STATELESS, Clip, ClipRule, Divisor, State, above_zero, whole
from lightning_optim.core.fragment import NUMBER, Fragment
from lightning_optim.core.stats import GradStats
from lightning_optim.core.typed import typed

SMALLEST = 1e-30
"""Replacement for a norm of 0, which has no logarithm and cannot be a divisor."""


@typed
class AutoClip(ClipRule):
    """Limit the global norm to a percentile of the last norms, the present one included.

    The window has norms before clipping, so the limit follows a new level of the norm as that fills the window. Note
    that percentile p clips (100 − p) % of the steps of a steady run. The 10 of the paper clips nine steps out of ten,
    which normalises the gradient rather than protecting from spikes; for protection use 90 to 99.

    Args:
        percentile: The percentile, above 0 and at most 100. The default is that of the paper.
        window: Number of norms in the window. (The paper uses all norms of the run.)
        warmup: Number of steps before the first clipping; skipped steps are not counted.

    Raises:
        ValueError: An argument is out of range.

    References:
        Seetharaman et al., AutoClip, 2020, https://arxiv.org/abs/2007.14469

    Example:
        >>> rule = AutoClip(percentile=50)
        >>> state = {**rule.init_state(1), "steps": torch.tensor(0)}
        >>> rule(GradStats(torch.tensor([9.0]), (1,)), state)
        tensor(1.)
    """

    def __init__(self, percentile: float = 10.0, window: int = 512, warmup: int = 0) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"Invalid percentile={percentile!r}: it must be above 0 and at most 100, for instance 10.")
        self.percentile = float(percentile)
        self.window = whole("window", window, 2, 512)
        self.warmup = whole("warmup", warmup, 0, 0)

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return an empty window."""
        return {"norms": torch.full((self.window,), torch.inf, device="cpu")}

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor, at least 1, shape []."""
        norm = stats.total_norm()
        kept = norm.to(state["norms"].dtype)  # Rounded like the window, so that a norm is never above itself.
        norm = torch.where(kept.isfinite(), kept.to(norm.dtype), norm)
        ordered = self._norms(norm, state).sort().values
        known = (state["steps"] + 1).clamp(max=self.window)
        bound = _quantile(ordered, known, self.percentile / 100) * limit
        divisor = (norm / bound.clamp(min=SMALLEST)).clamp(min=1.0)
        return torch.where(state["steps"] < self.warmup, torch.ones_like(divisor), divisor)

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Return the window with the present norm in place of the oldest."""
        return {"norms": self._norms(stats.total_norm(), state)}

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision and the next window as lines of a program."""
        lines = (
            "kept = single(norm)",
            "kept = pick(kept * 0.0 == 0.0, kept, norm)",
            f"here = index(norms) == modulo(steps, {float(self.window)})",
            f"known = minimum(steps + 1.0, {float(self.window)})",
            f"usual = quantile(where(here, single(kept), norms), known, {self.percentile / 100})",
            f"divisor = maximum(kept / maximum(usual * factor, {SMALLEST}), 1.0)",
            f"divisor = pick(steps < {float(self.warmup)}, 1.0, divisor)",
            "clipped = divisor > 1.0",
            "new_norms = where(here, norm, norms)",
            "new_steps = steps + 1.0",
        )
        return Fragment(lines, ("factor",), (), (("norms", self.window), ("steps", NUMBER)))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the factor on the percentile."""
        return (limit,)

    def _norms(self, norm: Tensor, state: State) -> Tensor:
        return _put(state["norms"], state["steps"], norm)


@typed
class ZClip(ClipRule):
    """Clip a global norm that is an outlier among recent ones, by its robust z-score in log space.

    With x = log ‖g‖, the median and σ = 1.4826 · MAD of the last ``window`` x (but σ at least 0.04, a spread of 4 %):

        z = (x − median) / σ;    z > threshold:  x ← median + threshold² / z · σ

    as in ZClip: the larger the outlier, the closer to the median. It differs from the paper in three points: a few
    spikes change neither median nor MAD; in log space, the spread of a quantity that is a product of many factors is
    the same at every level; and flagged norms do not enter the window. After ``patience`` consecutive flags, the window
    is shifted to the new level, and clipping ends. (The mean and variance of clipped values never follow a level that
    has risen by half.)

    Args:
        threshold: z₀, above 0; 2.5, as in the paper, affects about 1 % of the steps of a steady run.
        window: Number of steps in the window.
        warmup: Number of steps before the first clipping; skipped steps are not counted.
        patience: Number of consecutive flags after which the new level is adopted.
        max_norm: Additional fixed limit on the norm, from the first step on, for the warmup; None for no limit.

    Raises:
        ValueError: An argument is out of range.

    References:
        Kumar et al., ZClip, 2025, https://arxiv.org/abs/2504.02507
    """

    def __init__(
        self,
        threshold: float = 2.5,
        window: int = 128,
        warmup: int = 25,
        patience: int = 16,
        max_norm: float | None = None,
    ) -> None:
        self.threshold = above_zero("threshold", threshold, 2.5)
        self.window = whole("window", window, 2, 128)
        self.warmup = whole("warmup", warmup, 1, 25)
        if self.warmup > self.window:
            raise ValueError(
                f"Invalid warmup={warmup!r}: it must be at most window={window!r}, or clipping would never start."
            )
        self.patience = whole("patience", patience, 1, 16)
        self.max_norm = None if max_norm is None else above_zero("max_norm", max_norm, 1.0, "give None")

    def init_state(self, parameters: int) -> dict[str, Tensor]:
        """Return an empty window, and an empty list of consecutive flagged values."""
        return {
            "logs": torch.full((self.window,), torch.inf, device="cpu"),
            "known": torch.zeros((), dtype=torch.int64, device="cpu"),
            "flagged": torch.full((self.patience,), torch.inf, device="cpu"),
            "flags": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor, at least 1, shape []."""
        norm = stats.total_norm()
        excess, flag = self._excess(norm / limit, state)
        divisor = torch.where(flag, excess.exp(), torch.ones_like(norm))
        if self.max_norm is not None:
            divisor = divisor.maximum(norm / (self.max_norm * limit))
        return divisor

    def updated(self, stats: GradStats, state: State, clip: Clip) -> dict[str, Tensor]:
        """Add a norm that is not flagged to the window; move the window after ``patience`` flags in a row."""
        assert isinstance(clip, Divisor)
        x = _log(stats.total_norm())
        # The schedule of the limit is ignored here, because it does not change which norms are normal.
        _, flag = self._excess(stats.total_norm(), state)
        flagged = _put(state["flagged"], state["flags"], x)
        flags = torch.where(flag, state["flags"] + 1, torch.zeros_like(state["flags"]))
        moved = flags >= self.patience
        median = self._median(state["logs"], state["known"])
        to_new_level = self._median(flagged, flags) - median
        logs = torch.where(flag, state["logs"], _put(state["logs"], state["known"], x))
        return {
            "logs": torch.where(moved, logs + to_new_level, logs),
            "known": torch.where(flag, state["known"], state["known"] + 1),
            "flagged": flagged,
            "flags": torch.where(moved, torch.zeros_like(flags), flags),
        }

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision and the next windows as lines of a program."""
        window, patience = float(self.window), float(self.patience)
        at_most = () if self.max_norm is None else ("divisor = maximum(divisor, norm / highest)",)
        lines = (
            f"count = minimum(maximum(known, 1.0), {window})",
            "median = quantile(logs, count, 0.5)",
            "sigma = maximum(1.4826 * quantile(absolute(logs - median), count, 0.5), 0.04)",
            f"above = log(maximum(norm / factor, {SMALLEST})) - median",
            f"outlier = (above / sigma > {self.threshold}) & (known >= {float(self.warmup)})",
            f"excess = above - {self.threshold**2} / (above / sigma) * sigma",
            "divisor = pick(outlier, exp(excess), 1.0)",
            *at_most,
            "clipped = divisor > 1.0",
            f"value = log(maximum(norm, {SMALLEST}))",  # A schedule of the limit does not change what is normal.
            f"outlier = ((value - median) / sigma > {self.threshold}) & (known >= {float(self.warmup)})",
            f"new_flagged = where(index(flagged) == modulo(flags, {patience}), value, flagged)",
            "row = pick(outlier, flags + 1.0, 0.0)",
            f"moved = row >= {patience}",
            f"shift = quantile(single(new_flagged), minimum(maximum(row, 1.0), {patience}), 0.5) - median",
            f"here = (index(logs) == modulo(known, {window})) & negation(outlier)",
            "new_logs = where(here, value, logs)",
            "new_logs = where(moved, new_logs + shift, new_logs)",
            "new_known = pick(outlier, known, known + 1.0)",
            "new_flags = pick(moved, 0.0, row)",
            "new_steps = steps + 1.0",
        )
        states = (("logs", self.window), ("known", NUMBER), ("flagged", self.patience), ("flags", NUMBER))
        return Fragment(lines, ("factor",) if not at_most else ("factor", "highest"), (), (*states, ("steps", NUMBER)))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the factor on the limit, and the fixed limit."""
        return (limit,) if self.max_norm is None else (limit, self.max_norm * limit)

    def _excess(self, norm: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the amount by which log ``norm`` exceeds its clipped value, and whether it is flagged, [] each."""
        x = _log(norm)
        known = state["known"]
        median = self._median(state["logs"], known)
        sigma = (1.4826 * self._median((state["logs"] - median).abs(), known)).clamp(min=0.04)
        z = (x - median) / sigma
        flag = (z > self.threshold) & (state["known"] >= self.warmup)
        return x - median - self.threshold**2 / z * sigma, flag

    @staticmethod
    def _median(values: Tensor, known: Tensor) -> Tensor:
        return _quantile(values.sort().values, known.clamp(min=1, max=len(values)), 0.5)


def _log(norm: Tensor) -> Tensor:
    return norm.clamp(min=SMALLEST).log()


def _put(ring: Tensor, count: Tensor, value: Tensor) -> Tensor:
    """Return the ring buffer, [window], with ``value``, [], as entry number ``count``."""
    here = torch.arange(len(ring), device=ring.device) == count % len(ring)
    return torch.where(here, value.to(ring.dtype), ring)


def _quantile(ordered: Tensor, known: Tensor, q: float) -> Tensor:
    """Return the quantile of the first ``known`` values of ``ordered``, shape [], interpolated as numpy's default."""
    position = (known - 1) * q
    below = position.floor().to(torch.int64)
    above = torch.minimum(below + 1, known - 1)
    low, high = ordered.gather(0, torch.stack([below, above])).unbind()
    return torch.lerp(low, high, (position - below).to(ordered.dtype))
