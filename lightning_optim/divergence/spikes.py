"""What stands out from the last accepted values, by a robust z-score on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_GAP = 8
"""Steps without a flag that end a row of them: a new level near the threshold is not flagged at every step."""


class SpikeWindow:
    """Flags values of several signals that stand out, each from its own last accepted values.

    With x = log v, the median and σ = 1.4826 · MAD over the last ``window`` accepted x of a signal, a value is flagged
    if

        (x − median) / σ > threshold    and    v > (1 + min_rise) · median of v

    The robust spread lets a few spikes move nothing, the logarithm makes a spread a share of the level at every level,
    and the least rise keeps a nearly constant signal quiet. A signal that has been 0 or below in the window, such as a
    log-likelihood of densities, is judged without logarithm. ``patience`` flags in a row (with gaps of less than 8
    steps), of whichever signal, are a new level and not spikes: the windows move there, and the flags end. What is
    flagged or not finite never enters the window.

    Args:
        signals: How many signals.
        threshold: How many σ. OLMo-core skips at 6 of a mean and standard deviation, which NaN and spikes themselves
            move; 8 of the robust spread is about as rare on gradients with heavy tails.
        min_rise: Least rise above the median, as a share of it.
        window: How many accepted values are remembered.
        warmup: Accepted values before the first flag.
        patience: So many flags in a row are taken as a new level.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> window = SpikeWindow(signals=1, warmup=4)
        >>> for value in (1.0, 1.1, 0.9, 1.0, 9.0):
        ...     flags = window(torch.tensor([value]))
        ...     _ = window.commit(accepted=~flags.any())
        >>> flags
        tensor([True])
    """

    def __init__(
        self,
        signals: int,
        threshold: float = 8.0,
        min_rise: float = 0.1,
        window: int = 128,
        warmup: int = 64,
        patience: int = 16,
    ) -> None:
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(
                f"Invalid threshold={threshold!r}: a number of standard deviations above 0 is needed, for instance 8."
            )
        if not (math.isfinite(min_rise) and min_rise >= 0):
            raise ValueError(f"Invalid min_rise={min_rise!r}: a share of at least 0 is needed, for instance 0.1.")
        if not 2 <= warmup <= window:
            raise ValueError(
                f"Invalid warmup={warmup!r} with window={window!r}: it must be at least 2, and at most the window, or "
                "nothing would ever be flagged."
            )
        if patience < 1:
            raise ValueError(f"Invalid patience={patience!r}: a whole number of at least 1 is needed, for instance 16.")
        self.threshold, self.min_rise, self.warmup, self.patience = threshold, min_rise, warmup, patience
        self._state = {
            "values": torch.full((signals, window), torch.inf),
            "known": torch.zeros(signals, dtype=torch.int64),
            "flagged": torch.full((signals, patience), torch.inf),
            "flags": torch.zeros((), dtype=torch.int64),
            "quiet": torch.zeros((), dtype=torch.int64),
        }
        self._now: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Which signals stand out now.

        Args:
            values: One value of each signal, shape [signals]; NaN for a signal that is not there.

        Returns:
            Bool, shape [signals], on the device of ``values``.
        """
        values = values.detach().to(torch.float32)
        self._to(values.device)
        ring, known = self._state["values"], self._state["known"]
        median = _median(ring, known)
        logs = ((ring > 0).all(dim=1)) & (values > 0)
        x, level = torch.where(logs, values.log(), values), torch.where(logs, median.log(), median)
        spread = torch.where(logs[:, None], ring.log(), ring)
        sigma = 1.4826 * _median((spread - level[:, None]).abs(), known)
        rises = values - median > self.min_rise * median.abs()
        flags = (x - level > self.threshold * sigma) & rises & (known >= self.warmup) & values.isfinite()
        self._now = values, flags, median
        return flags

    @property
    def medians(self) -> Tensor:
        """What each signal was compared with, shape [signals]; infinite before the first value."""
        assert self._now is not None
        return self._now[2]

    def commit(self, accepted: Tensor) -> Tensor:
        """Ends the step.

        Args:
            accepted: Whether the step was taken, bool, shape [] or [signals]: values of a skipped one do not enter.

        Returns:
            By what factor each signal's level has moved, shape [signals]; 0 where it has not.
        """
        assert self._now is not None
        values, flags, median = self._now
        state, finite = self._state, values.isfinite()
        enters = accepted & finite & ~flags
        any_flag = flags.any()
        # A step that is skipped for another reason says nothing.
        passed = enters.any() & ~any_flag
        quiet = torch.where(any_flag, torch.zeros_like(state["quiet"]), state["quiet"] + passed.to(torch.int64))
        flagged = torch.where(any_flag, _put(state["flagged"], state["flags"], values), state["flagged"])
        count = torch.where(quiet < _GAP, state["flags"] + any_flag.to(torch.int64), torch.zeros_like(quiet))
        full = count >= self.patience
        level = _median(flagged, count.expand(len(values)))
        moved = full & (level - median > self.min_rise * median.abs()) & level.isfinite()
        positive = (median > 0) & (level > 0)
        factor = torch.where(positive, level / median, torch.ones_like(level))
        shift = torch.where(positive, torch.zeros_like(level), level - median)
        ring = torch.where(enters[:, None], _put(state["values"], state["known"], values), state["values"])
        self._state = {
            "values": torch.where(moved[:, None], ring * factor[:, None] + shift[:, None], ring),
            "known": state["known"] + enters.to(torch.int64),
            "flagged": flagged,
            "flags": torch.where(full, torch.zeros_like(count), count),
            "quiet": quiet,
        }
        return torch.where(moved, factor, torch.zeros_like(factor))

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers, plain tensors."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what another has remembered; one of another size is left, and the window starts afresh."""
        if all(name in state and state[name].shape == value.shape for name, value in self._state.items()):
            self._state = {name: state[name].clone() for name in self._state}

    def _to(self, device: torch.device) -> None:
        if self._state["values"].device != device:
            self._state = {name: value.to(device) for name, value in self._state.items()}


@dataclass(frozen=True)
class Spikes:
    """What stands out, and whether such a step is skipped; see `SpikeWindow`.

    Args:
        threshold: How many robust standard deviations above the median of the last accepted values.
        min_rise: And how much above the median, as a share of it.
        window: How many accepted values are remembered.
        warmup: Accepted steps before the first flag.
        patience: So many flags in a row are a new level, not spikes.
        skip: Whether to skip the step; otherwise it is told of only.

    Raises:
        ValueError: An argument is out of range.
    """

    threshold: float = 8.0
    min_rise: float = 0.1
    window: int = 128
    warmup: int = 64
    patience: int = 16
    skip: bool = True

    def __post_init__(self) -> None:
        self.window_of(1)

    def window_of(self, signals: int) -> SpikeWindow:
        """What looks at so many signals."""
        return SpikeWindow(signals, self.threshold, self.min_rise, self.window, self.warmup, self.patience)


def _put(ring: Tensor, count: Tensor, values: Tensor) -> Tensor:
    """Each row of the ring with its value as entry number ``count``, of shape [] or [rows]."""
    here = torch.arange(ring.shape[1], device=ring.device) == (count % ring.shape[1]).reshape(-1, 1)
    return torch.where(here, values[:, None], ring)


def _median(values: Tensor, known: Tensor) -> Tensor:
    """Median of the first ``known`` of each row (the lower of two), where the unknown ones are infinite."""
    last = (known.clamp(max=values.shape[1]) - 1).clamp(min=0)
    return values.sort(dim=1).values.gather(1, (last // 2)[:, None])[:, 0]
