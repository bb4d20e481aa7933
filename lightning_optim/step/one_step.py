"""One step in progress: its gradients, what has been measured about them, and what has been decided."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import Clip, Divisor
from lightning_optim.core.stats import GradStats, StepRecord, StepStats
from lightning_optim.core.transfer import upload
from lightning_optim.step.foreign_stats import ForeignUpdate
from lightning_optim.step.gradients import Gradients, ReadGradStats, group_names_of
from lightning_optim.step.histograms import StepHistograms
from lightning_optim.step.operands import StepOperands


class OneStep:
    """One step, from the reading of its gradients to its record.

    `StepPipeline` sets ``clip`` and ``skip`` as it decides. A step that is reported is also measured around its update:
    by the optimizer's own kernel where that is possible, else by `ForeignUpdate`.

    Args:
        gradients: The gradients that the update is about to use.
        reported: Whether a `StepRecord` of this step is wanted.
        stats: Statistics of the gradients; None for those that `ReadGradStats` reads.

    Attributes:
        stats: Statistics of the gradients, each measured on first use.
        clip: The decision of the clip rule; None for no clipping.
        skip: Non-zero if the step must not happen, shape [], on the device; None if nothing can skip it.
        clipped_norm_sq: Square sum of each gradient that the update uses, shape [tensors], in a reported step.
    """

    def __init__(self, gradients: Gradients, reported: bool, stats: ReadGradStats | None = None) -> None:
        self.gradients = gradients
        self.stats = ReadGradStats(gradients) if stats is None else stats
        self.reported = reported
        self.clip: Clip | None = None
        self.skip: Tensor | None = None
        self._foreign: ForeignUpdate | None = None
        self._histograms: StepHistograms | None = None
        self.clipped_norm_sq: Tensor | None = None

    def hand_over(self, operands: StepOperands, loss: Any) -> None:
        """Hand divisor and skip flag to the update, which comes next, and measure what it will use, for a report.

        Args:
            operands: The way to the optimizer.
            loss: The result of the closure.

        Raises:
            StepSkipped: The update must not happen, and the optimizer takes no flag.
        """
        operands.apply(*self._held_here(), self.skip, loss)
        if self.reported:
            after = self.stats.norm_sq if self.clip is None else self.clip.norm_sq_after(self.stats)
            self.clipped_norm_sq = self.gradients.norm_sq_now() if after is None else after
        if self._foreign is not None:
            self._foreign.before()

    def continues(self, earlier: OneStep) -> None:
        """Take the place of an earlier evaluation of the closure in the same step: the update is that of the step."""
        if self._foreign is not None and earlier._foreign is not None:
            self._foreign.begin_with(earlier._foreign)

    def _held_here(self) -> tuple[Sequence[Tensor], Clip | None]:
        """Return the gradients that the optimizer will find on this rank, and the clip decision for these alone."""
        grads, clip = self.gradients.grads, self.clip
        if self.gradients.shards is None or (present := self.gradients.present()) is None:
            return grads, clip
        if isinstance(clip, Divisor) and clip.values.dim() == 1:
            clip = Divisor(clip.values[upload(present, clip.values.device)])
        return [grads[i] for i in present], clip

    def measure_update(self, optimizer: Optimizer, histograms: Collection[str]) -> None:
        """Prepare the measurement of the update's sums; call it before the update.

        Args:
            optimizer: The optimizer that is about to step.
            histograms: Kinds of magnitudes to count (`lightning_optim.step.histograms.KINDS`).
        """
        if histograms:
            self._histograms = StepHistograms(self.gradients, histograms)
        if hasattr(optimizer, "collect_step_stats"):
            optimizer.collect_step_stats = True
        else:
            self._foreign = ForeignUpdate(optimizer, self.gradients)

    def record(self, optimizer: Optimizer, steps: int, counts: Tensor, norms: Tensor) -> StepRecord:
        """Return the record of the step; call it after the update.

        Args:
            optimizer: The optimizer, which has stepped.
            steps: Steps so far, this one included.
            counts: Clipped and skipped steps so far, int64, shape [2].
            norms: Count, mean and maximum of the gradient norm since the last record, shape [3].
        """
        if self.clipped_norm_sq is None:  # The step was skipped before anything was measured.
            self.clipped_norm_sq = torch.full_like(self.stats.norm_sq, torch.nan)
        if self._foreign is not None:
            sums = self._foreign.sums(self.clipped_norm_sq)
            if self.skip is not None:  # Fused optimizers also return NaN where there was no update.
                sums = sums.masked_fill(self.skip > 0, torch.nan)
            update = StepStats(sums, self.gradients.group_sizes, self.stats.numel)
        else:
            update = optimizer.step_stats  # type: ignore[attr-defined]
            optimizer.collect_step_stats = False  # type: ignore[attr-defined]
            if self.gradients.shards is not None:
                update = self._over_shards(update)
        zero = torch.zeros_like(self.stats.norm_sq[0])
        return StepRecord(
            group_names=group_names_of(optimizer),
            hyperparameters=tuple(
                {key: value for key, value in group.items() if key not in ("params", "param_names")}
                for group in optimizer.param_groups
            ),
            grad=GradStats(self.stats.norm_sq, self.gradients.group_sizes),  # This must not keep the gradients alive.
            clipped_norm_sq=self.clipped_norm_sq,
            skip=zero if self.skip is None else self.skip,
            update=update,
            steps=steps,
            counts=counts.clone(),
            param_names=self.stats.names,
            norms=norms,
            histograms={} if self._histograms is None else self._histograms.after(self.skip),
        )

    def _over_shards(self, update: StepStats) -> StepStats:
        """Return the sums over whole tensors, from the optimizer's sums over this rank's parts of flat shards."""
        sums = update.sums
        if (present := self.gradients.present()) is not None:
            here = upload(present, sums.device, torch.int64)
            sums = sums.new_zeros(len(self.gradients.params), sums.shape[1]).index_copy(0, here, sums)
        return StepStats(self.gradients.sum_shards(sums), self.gradients.group_sizes, self.stats.numel)
