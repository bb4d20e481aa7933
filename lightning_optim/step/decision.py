"""The decision of each step of an optimizer: how it is clipped, whether it is skipped, and the counts of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.clipping import Clipper
from lightning_optim.core.sharding import max_over_ranks
from lightning_optim.core.stats import StepCounts
from lightning_optim.core.transfer import HostMirror
from lightning_optim.divergence import Detector
from lightning_optim.step.fused import Decided, FusedDecision
from lightning_optim.step.one_step import OneStep


class Decision:
    """Clips, skips and counts the steps of one optimizer.

    Clip rule and detectors are asked as one program where that is possible (`FusedDecision`), else one after the other,
    in torch's operations.

    Args:
        clipper: The clip rule and its state; None for no clipping.
        detectors: The detectors, each of which may request a skip.
        counts: Counts to start from.
        device: The device of the decision.
        fused: Whether to try one program; not for statistics that are more than those of the gradients at hand.
        mirrored: Whether `numbers` is asked for, for which the counts are copied to the host.

    Attributes:
        counts: Clipped and skipped steps so far, int64, shape [2], on the device.
    """

    def __init__(
        self,
        clipper: Clipper | None,
        detectors: Sequence[Detector],
        counts: StepCounts,
        device: torch.device,
        *,
        fused: bool = True,
        mirrored: bool = True,
    ) -> None:
        self._clipper, self._detectors = clipper, tuple(detectors)
        self.counts = torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device=device)
        self._on_host = HostMirror(self.counts) if mirrored else None
        self._fused = FusedDecision(clipper if fused else None, detectors if fused else ())
        self._decided: Decided | None = None

    def numbers(self, exact: bool = False) -> list[int]:
        """Return the numbers of clipped and skipped steps.

        Args:
            exact: Whether to wait for the device; else they may lag a few steps on an accelerator.
        """
        return list(map(int, self.counts.tolist() if exact or self._on_host is None else self._on_host.read()))

    def load(self, counts: StepCounts) -> None:
        """Restore other counts."""
        self._set(
            torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device="cpu").to(self.counts.device)
        )

    def count_left_out(self) -> None:
        """Count a step that was skipped, and whose gradients are gone."""
        self._set(self.counts + self.counts.new_tensor([0, 1]))

    def add(self, flags: Tensor) -> None:
        """Count a step that was decided elsewhere: whether it was clipped, and skipped, int64, shape [2]."""
        self._set(self.counts + flags)

    def open(self, step: OneStep, incoming: Tensor | None, steps: int) -> None:
        """Decide a step: set its ``clip`` and ``skip``.

        Args:
            step: The step, whose gradients have been collected.
            incoming: Flag, shape [], non-zero to skip the step; None for none.
            steps: Optimizer steps so far.
        """
        step.skip = incoming
        self._decided = self._fused.decide(step, incoming, steps, self.counts)
        if self._decided is not None:
            if step.clip is not None:
                step.stats.clipped = step.clip.norm_sq_after
            return
        gradients = step.gradients
        if self._clipper is not None:
            step.clip = self._clipper.decide(step.stats, steps, gradients.parameters, self.counts.device)
            step.stats.clipped = step.clip.norm_sq_after
        for detector in self._detectors:
            flag = detector(step.stats).to(torch.float32)
            step.skip = flag if step.skip is None else torch.maximum(step.skip, flag)
        if step.skip is not None and not gradients.plain:
            step.skip = max_over_ranks(step.skip, gradients.params)

    def close(self, step: OneStep) -> Tensor | None:
        """End a step: count it, and advance the state of rule and detectors.

        Returns:
            The norm of its gradients, shape [], if it has been measured.
        """
        decided, self._decided = self._decided, None
        if decided is not None:
            self._fused.adopt(decided)
            self._set(decided.counts)
            return decided.norm
        taken = None if step.skip is None else step.skip == 0
        if self._clipper is not None:
            assert step.clip is not None
            accepted = step.stats.finite() if taken is None else step.stats.finite() & taken
            self._clipper.commit(accepted)
            clipped = step.clip.flag() & accepted
            self._set(self.counts + torch.stack([clipped, torch.zeros_like(clipped) if taken is None else ~taken]))
        elif taken is not None:
            self._set(self.counts + torch.stack([torch.zeros_like(taken), ~taken]))
        for detector in self._detectors:
            assert step.skip is not None
            detector.commit(step.skip)
        return step.stats.total_norm() if step.stats.norm_sq_is_read else None

    def _set(self, counts: Tensor) -> None:
        self.counts = counts
        if self._on_host is not None:
            self._on_host.push(counts)
