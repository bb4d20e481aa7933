"""The part of the guard that has to know before the update: what is wrong with this step, and must it be skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.divergence.base import NonFiniteGradient
from lightning_optim.divergence.rows import Row, Rows
from lightning_optim.divergence.spikes import SpikeWindow
from lightning_optim.stats import GradStats

SIGNALS = ("grad_norm", "loss")
"""What spikes are looked for in."""

_NAMED = 4
_COLUMNS = (
    "skipped",
    "bad_tensors",
    "bad_loss",
    *(f"{kind}_{signal}" for kind in ("spike", "level", "value", "median") for signal in SIGNALS),
    *(f"worst_{i}" for i in range(_NAMED)),
)


@dataclass(frozen=True)
class StepSeen:
    """One step, as the watch saw it.

    Args:
        step: Optimizer steps so far, this one included.
        skipped: Whether the step did not happen, for whatever reason.
        bad_tensors: How many gradients had a NaN or an infinity.
        bad_loss: Whether the loss was not finite.
        spikes: Which of `SIGNALS` stood out.
        levels: By what factor a signal's baseline moved at this step, for those that did.
        values: Gradient norm and loss; NaN for a loss that is unknown.
        medians: What they were compared with.
        worst: Which parameters, by their place in the optimizer, had the worst gradients: those that are not finite
            first, then the largest.
        group_norms: Gradient norm of each group.
    """

    step: int
    skipped: bool
    bad_tensors: int
    bad_loss: bool
    spikes: tuple[str, ...]
    levels: dict[str, float]
    values: dict[str, float]
    medians: dict[str, float]
    worst: tuple[int, ...]
    group_norms: tuple[float, ...]

    @staticmethod
    def from_row(row: Row) -> StepSeen:
        """What a row of `Watch` says."""
        at = dict(zip(_COLUMNS, row.values, strict=False))
        return StepSeen(
            step=row.step,
            skipped=at["skipped"] != 0,
            bad_tensors=int(at["bad_tensors"]),
            bad_loss=at["bad_loss"] != 0,
            spikes=tuple(signal for signal in SIGNALS if at[f"spike_{signal}"]),
            levels={signal: level for signal in SIGNALS if (level := at[f"level_{signal}"])},
            values={signal: at[f"value_{signal}"] for signal in SIGNALS},
            medians={signal: at[f"median_{signal}"] for signal in SIGNALS},
            worst=tuple(int(at[f"worst_{i}"]) for i in range(_NAMED) if at[f"worst_{i}"] >= 0),
            group_norms=tuple(row.values[len(_COLUMNS) :]),
        )


class Watch(NonFiniteGradient):
    """Looks at loss and gradients of every step of one optimizer, says skip, and writes down what it saw.

    A step is skipped if a gradient or the loss is not finite and, if asked for, if the gradient norm or the loss stands
    out. Nothing here waits for the device. All ranks see the same gradients; the loss has to be reduced by who hands
    it over.

    Args:
        spikes: When a value stands out; None to look for no spikes.
        skip: Which of `SIGNALS` make a step be skipped when they stand out.
        loss: Returns the loss of the step, shape [], on any device; None if it is not known.
        rows: Where to write.

    Example:
        >>> watch = Watch()
        >>> watch(GradStats(torch.tensor([1.0, float("inf")]), group_sizes=(2,)))
        tensor(True)
        >>> watch.commit(torch.tensor(1.0))
        >>> seen = watch.read()[0]
        >>> seen.skipped, seen.bad_tensors, seen.worst
        (True, 1, (1, 0))
    """

    def __init__(
        self,
        spikes: SpikeWindow | None = None,
        skip: tuple[str, ...] = SIGNALS,
        loss: Callable[[], Tensor | None] = lambda: None,
        rows: Rows | None = None,
    ) -> None:
        self.spikes = spikes
        self._skips = [signal in skip for signal in SIGNALS]
        self._loss = loss
        self.rows = rows or Rows()
        self._steps = 0
        self._now: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Steps seen so far, skipped ones included."""
        return self._steps

    def __call__(self, stats: GradStats) -> Tensor:
        """Whether to skip, bool, shape []."""
        norm_sq = stats.norm_sq
        norm = norm_sq.sum().sqrt()
        loss = self._loss()
        known = loss is not None
        loss = torch.full_like(norm, torch.nan) if loss is None else loss.detach().to(norm.device, non_blocking=True)
        values = torch.stack([norm, loss.to(norm.dtype)])
        bad = ~norm_sq.isfinite()
        bad_loss = ~loss.isfinite() if known else torch.zeros_like(bad[0])
        if self.spikes is None:
            flags, medians = torch.zeros_like(values), torch.full_like(values, torch.nan)
            spiked = torch.zeros_like(bad_loss)
        else:
            flagged = self.spikes(values)
            flags, medians = flagged.to(values.dtype), self.spikes.medians.to(values.dtype)
            wanted = [flag for flag, skips in zip(flagged.unbind(), self._skips, strict=True) if skips]
            spiked = torch.stack(wanted).any() if wanted else torch.zeros_like(bad_loss)
        self._now = [bad.sum(), bad_loss, flags, values, medians, self._worst(norm_sq, bad, stats), stats.group_norms()]
        return bad.any() | bad_loss | spiked

    def commit(self, skip: Tensor) -> None:
        """Lets the baselines move on if the step happened, and sends the row off."""
        bad, bad_loss, flags, values, medians, worst, groups = self._now
        skipped = skip != 0
        accepted = ~skipped.to(values.device)
        levels = torch.zeros_like(values) if self.spikes is None else self.spikes.commit(accepted)
        self._steps += 1
        columns = [skipped, bad, bad_loss, flags, levels, values, medians, worst, groups]
        device = values.device
        self.rows.write(self._steps, torch.cat([c.to(device, torch.float32).reshape(-1) for c in columns]))
        self._now = []

    def read(self, everything: bool = False) -> list[StepSeen]:
        """What the host has not heard of yet; see `Rows.read`."""
        return [StepSeen.from_row(row) for row in self.rows.read(everything)]

    def state_dict(self) -> dict[str, Any]:
        """Baselines, and what was on its way to the host: plain numbers and tensors."""
        spikes = {} if self.spikes is None else self.spikes.state_dict()
        return {"steps": self._steps, "spikes": spikes, "rows": self.rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self._steps = state["steps"]
        self.rows.load_state_dict(state["rows"])
        if self.spikes is not None and state["spikes"]:
            self.spikes.load_state_dict(state["spikes"])

    @staticmethod
    def _worst(norm_sq: Tensor, bad: Tensor, stats: GradStats) -> Tensor:
        order = torch.where(bad, torch.inf, norm_sq).sort(descending=True, stable=True).indices[:_NAMED]
        places = order if stats.places is None else stats.places.to(order.device)[order]
        return torch.nn.functional.pad(places, (0, _NAMED - len(places)), value=-1)
