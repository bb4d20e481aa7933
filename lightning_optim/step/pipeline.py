"""One optimizer step, one pass: measure, decide, apply, report.

A pipeline hangs on the public step hooks of one torch optimizer, so nothing else changes: ``optimizer.step()`` clips,
skips and measures by itself, in a plain loop, with a closure, under a GradScaler and under Lightning alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.clipping import Clip, Clipper, ClipRule, Divisor
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.interval import Interval
from lightning_optim.core.sharding import max_over_ranks
from lightning_optim.core.stats import GradStats, StepCounts, StepRecord, StepStats
from lightning_optim.core.step_hooks import closure_of, is_trial_step, run_closure
from lightning_optim.core.transfer import HostMirror, upload
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.divergence import Detector, NonFiniteGradient
from lightning_optim.step.foreign_stats import ForeignUpdate
from lightning_optim.step.gradients import Gradients, group_names_of, names_of
from lightning_optim.step.histograms import StepHistograms
from lightning_optim.step.operands import StepSkipped, operands_for

__all__ = ["StepPipeline"]


class StepPipeline:
    """Clips, guards and measures every step of one optimizer.

    The gradients are read once, whatever uses them, and not at all if nothing does. Clipping and skipping reach the
    update as described in `lightning_optim.step.operands`. A clip rule makes steps with a gradient that is not finite
    be skipped wherever the host need not wait for that; elsewhere (on an accelerator, with an optimizer that takes no
    operands) a detector has to ask for it.

    Args:
        optimizer: The optimizer; not LBFGS, which evaluates its closure several times per step.
        clip: How gradients are clipped; None for not at all.
        clip_limit: By what the clip rule's limit is multiplied, as a function of the steps taken so far; for instance a
            `Schedule`. None for 1.
        detectors: What makes a step be skipped; any of them suffices.
        on_report: Receives the record of each step for which ``report_due`` said yes.
        report_due: Asked before each update whether to collect a record of it.
        histograms: Asked before each update of which a record is collected what it shall count
            (`lightning_optim.step.histograms.KINDS`).
        counts: Where the counts start, on a resume.
        clip_state: What `clip_state` gave, on a resume.
        names: Names of parameters, for clip rules that ask for them; those in the optimizer's groups need none.
        group_names: What groups a clip rule may speak of; None for those of the optimizer.
        shards: Where torch's first FSDP has cut the parameters up (`FlatShards.of(model)`); None if it has not.

    Raises:
        TypeError: The optimizer is LBFGS.
        ValueError: The clip rule speaks of a group or parameter that is not there, or needs whole rows of shards.

    Example:
        >>> from lightning_optim.clipping import GlobalNorm
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> pipeline = StepPipeline(optimizer, clip=GlobalNorm(max_norm=0.5))
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> pipeline.counts().clipped
        1
        >>> pipeline.close()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clip: ClipRule | None = None,
        clip_limit: Callable[[int], float] | None = None,
        detectors: Sequence[Detector] = (),
        on_report: Callable[[StepRecord], None] | None = None,
        report_due: Callable[[], bool] = lambda: True,
        histograms: Callable[[], Collection[str]] = tuple,
        counts: StepCounts | None = None,
        clip_state: Mapping[str, Any] | None = None,
        names: Mapping[Tensor, str] | None = None,
        group_names: Collection[str] | None = None,
        shards: FlatShards | None = None,
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times per step, so there is no one gradient to clip, check or "
                "measure. Use another optimizer, or leave out clipping, guard and monitor."
            )
        self.optimizer = optimizer
        self.clipper = None if clip is None else Clipper(clip, clip_limit)
        self.detectors = tuple(detectors)
        self._names = names or {}
        self._shards = shards
        self.on_report = on_report
        self.report_due = report_due
        self.histograms = histograms
        counts = counts or StepCounts()
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self._steps = counts.steps
        self._counts = torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device=device)
        self._counts_on_host = HostMirror(self._counts)
        self._norms = Interval(device)
        self._expected = False
        self._step: _Step | None = None
        self._operands = operands_for(optimizer, may_skip=bool(self.detectors))
        if self.clipper is not None:
            self.clipper.load_state_dict(clip_state or {})
            known = set(group_names_of(optimizer)) if group_names is None else group_names
            self.clipper.rule.check(known, self._all_names())
            if shards is not None and self.clipper.rule.reads_units:
                raise ValueError(
                    f"{clip!r} needs whole rows of matrices, and FSDP cuts flattened parameters anywhere. Use FSDP2 "
                    "(fully_shard, Lightning's ModelParallelStrategy), which cuts between rows, or another method."
                )
            if self._operands.skips_for_free and not any(isinstance(d, NonFiniteGradient) for d in self.detectors):
                self.detectors = (NonFiniteGradient(), *self.detectors)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(uncompiled(self._before)),
            optimizer.register_step_post_hook(uncompiled(self._after)),
        ]

    def close(self) -> None:
        """Leaves the optimizer as it was."""
        while self._handles:
            self._handles.pop().remove()
        self._operands.restore()
        self._operands.close()

    def counts(self) -> StepCounts:
        """Steps, clipped and skipped so far; on an accelerator the latter two may be a few steps late."""
        self.settle()
        return StepCounts(self._steps, *map(int, self._counts_on_host.read()))

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included; known without waiting."""
        return self._steps

    @property
    def is_expecting(self) -> bool:
        """Whether a step was announced that has not come."""
        return self._expected

    def load_counts(self, counts: StepCounts) -> None:
        """Goes back, or on, to counts that `counts` gave."""
        self._expected = False
        self._steps = counts.steps
        self._counts.copy_(torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64))
        self._counts_on_host.push()

    def clip_state(self) -> dict[str, Any]:
        """What the clip rule remembers, as plain tensors for a checkpoint; empty if nothing."""
        return {} if self.clipper is None else self.clipper.state_dict()

    def load_clip_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `clip_state` gave."""
        if self.clipper is not None:
            self.clipper.load_state_dict(state)

    def expect_step(self) -> None:
        """Says that gradients are ready and a step should follow.

        A GradScaler that found an overflow does not call the ``step`` of an optimizer without operands; an expected
        step that has not come by the time somebody asks for the counts is counted as skipped.
        """
        self._expected = True

    def settle(self) -> None:
        """Accounts for an expected step that did not come."""
        if self._expected:
            self._expected = False
            if (step := self._open()) is not None:
                step.skip = torch.ones_like(self._counts[0], dtype=torch.float32)
                self._close(step)

    # One step, in order: `_before` runs the closure, measures, decides and hands over; the optimizer updates; `_after`
    # counts and reports.

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self._operands.restore()  # the last update may have been interrupted
        if is_trial_step(optimizer, closure_of(args, kwargs)):
            self._step = None
            return args, kwargs
        args, kwargs, loss = run_closure(args, kwargs)
        self._expected = False
        step = self._step = self._open()
        if step is not None:
            try:
                self._operands.apply(*step.held_here(), step.skip, loss)
                step.measure_clipped()
            except StepSkipped:
                self._after(optimizer, args, kwargs)
                raise
        return args, kwargs

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._operands.restore()
            self._close(step)

    def _open(self) -> _Step | None:
        """Measures and decides; None if there is no gradient, so that no step can happen."""
        scale, skip = self._operands.incoming()
        gradients = Gradients(self.optimizer, scale, self._names, self._shards)
        if not gradients.grads:
            return None
        reported = self.on_report is not None and self.report_due()
        step = _Step(gradients, reported)
        step.skip = skip
        if self.clipper is not None:
            step.clip = self.clipper.decide(step.stats, self._steps, gradients.parameters, self._counts.device)
        for detector in self.detectors:
            flag = detector(step.stats).to(torch.float32)
            step.skip = flag if step.skip is None else torch.maximum(step.skip, flag)
        if step.skip is not None:
            step.skip = max_over_ranks(step.skip, gradients.params)
        if step.reported:
            step.watch_update(self.optimizer, self.histograms())
            _ = step.stats.norm_sq  # before clipping rewrites the gradients
        return step

    def _close(self, step: _Step) -> None:
        self._steps += 1
        taken = None if step.skip is None else step.skip == 0
        if self.clipper is not None:
            assert step.clip is not None
            accepted = step.stats.finite() if taken is None else step.stats.finite() & taken
            self.clipper.commit(accepted)
            clipped = step.clip.flag() & accepted
            self._counts += torch.stack([clipped, torch.zeros_like(clipped) if taken is None else ~taken])
        elif taken is not None:
            self._counts[1] += ~taken
        for detector in self.detectors:
            assert step.skip is not None
            detector.commit(step.skip)
        self._counts_on_host.push()
        if self.on_report is not None and step.stats.norm_sq_is_read:
            self._norms.add(step.stats.total_norm())
        if step.reported:
            assert self.on_report is not None
            self.on_report(step.record(self.optimizer, self._steps, self._counts, self._norms.take()))

    def _all_names(self) -> set[str]:
        return {
            name for group in self.optimizer.param_groups for name in names_of(group, self._names) if name is not None
        }


class _Step:
    """A step in the making: its tensors, and what has been measured and decided about it."""

    def __init__(self, gradients: Gradients, reported: bool) -> None:
        self.gradients = gradients
        self.stats = gradients.stats
        self.reported = reported
        self.clip: Clip | None = None
        self.skip: Tensor | None = None
        self._foreign: ForeignUpdate | None = None
        self._histograms: StepHistograms | None = None
        self._clipped_norm_sq: Tensor | None = None

    def held_here(self) -> tuple[list[Tensor], Clip | None]:
        """The gradients that the optimizer will find on this rank, and what to do with them."""
        grads, clip = self.gradients.grads, self.clip
        if self.gradients.shards is None or (present := self.gradients.present()) is None:
            return grads, clip
        if isinstance(clip, Divisor) and clip.values.dim() == 1:
            clip = Divisor(clip.values[upload(present, clip.values.device)])
        return [grads[i] for i in present], clip

    def measure_clipped(self) -> None:
        """Called when clipping has been handed over: the report wants to know what the update sees."""
        if self.reported:
            after = self.stats.norm_sq if self.clip is None else self.clip.norm_sq_after(self.stats)
            self._clipped_norm_sq = self.gradients.norm_sq_now() if after is None else after
        if self._foreign is not None:
            self._foreign.before()

    def watch_update(self, optimizer: Optimizer, histograms: Collection[str]) -> None:
        if histograms:
            self._histograms = StepHistograms(self.gradients, histograms)
        if hasattr(optimizer, "collect_step_stats"):
            optimizer.collect_step_stats = True
        else:
            self._foreign = ForeignUpdate(optimizer, self.gradients)

    def record(self, optimizer: Optimizer, steps: int, counts: Tensor, norms: Tensor) -> StepRecord:
        if self._clipped_norm_sq is None:  # the step was left out
            self._clipped_norm_sq = torch.full_like(self.stats.norm_sq, torch.nan)
        if self._foreign is not None:
            sums = self._foreign.sums(self._clipped_norm_sq)
            if self.skip is not None:  # as our own optimizers say it: there was no update
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
            grad=GradStats(self.stats.norm_sq, self.gradients.group_sizes),  # without a hold on the gradients
            clipped_norm_sq=self._clipped_norm_sq,
            skip=zero if self.skip is None else self.skip,
            update=update,
            steps=steps,
            counts=counts.clone(),
            param_names=self.stats.names,
            norms=norms,
            histograms={} if self._histograms is None else self._histograms.after(self.skip),
        )

    def _over_shards(self, update: StepStats) -> StepStats:
        """Sums that the optimizer has taken over its parts of flat shards, as those of whole tensors."""
        sums = update.sums
        if (present := self.gradients.present()) is not None:
            here = upload(present, sums.device, torch.int64)
            sums = sums.new_zeros(len(self.gradients.params), sums.shape[1]).index_copy(0, here, sums)
        return StepStats(self.gradients.sum_shards(sums), self.gradients.group_sizes, self.stats.numel)
