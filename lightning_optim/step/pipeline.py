"""One optimizer step, one pass: measure, decide, apply, report.

A pipeline is a pre-hook and a post-hook of one torch optimizer, so that ``optimizer.step()`` itself clips, skips and
measures: in a plain loop, with a closure, under a GradScaler and under Lightning alike. This is the path of a gradient,
in the order of the calls:

1. `StepPipeline._before` runs the closure, so that the gradients are those of this step.
2. `StepPipeline._open` collects them (`step/gradients.py`), asks the clip rule for a divisor (`clipping/`) and the
   detectors for a skip flag (`divergence/`). Each of these reads `GradStats`, where a quantity is measured on first
   use.
3. `OneStep.hand_over` and `StepOperands.apply` (`step/operands.py`) hand divisor and flag to the update, as tensors on
   the device.
4. The optimizer updates its parameters with ``grad / divisor``, unless it skips (`kernels/`, for the optimizers of this
   package).
5. `StepPipeline._after` counts, advances the state of rule and detectors, and reports (`step/one_step.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.clipping import Clipper, ClipRule
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.interval import Interval
from lightning_optim.core.sharding import max_over_ranks
from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.core.step_hooks import closure_of, is_trial_step, run_closure
from lightning_optim.core.transfer import HostMirror
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.divergence import Detector, NonFiniteGradient
from lightning_optim.optim import FusedOptimizer
from lightning_optim.step.gradients import Gradients, group_names_of, names_of
from lightning_optim.step.one_step import OneStep
from lightning_optim.step.operands import StepSkipped, operands_for

__all__ = ["StepPipeline"]


class StepPipeline:
    """Clip, guard and measure every step of one optimizer.

    The gradients are read once, however many of these need them, and not at all if none does. Clipping and skipping
    reach the update as described in `lightning_optim.step.operands`. With a clip rule, a step with a gradient that is
    not finite is skipped wherever the host need not wait for the flag; elsewhere (on an accelerator, with an optimizer
    that takes no operands) a detector has to request the skip.

    Args:
        optimizer: The optimizer, or what Fabric's ``setup`` makes of it; not LBFGS, which evaluates its closure several
            times per step.
        clip: The clip rule; None for no clipping.
        clip_limit: Factor on the limit of the clip rule, as a function of the number of steps so far, for instance a
            `Schedule`; None for 1.
        detectors: Detectors, each of which may request that a step be skipped.
        on_report: Called with the record of each step for which ``report_due`` returned True.
        report_due: Called before each update; returns whether to collect a record of the step.
        histograms: Called before each update of which a record is collected; returns the kinds of magnitudes to count
            (`lightning_optim.step.histograms.KINDS`).
        counts: Counts to start from when a run is resumed; None for zeros.
        clip_state: State to start from when a run is resumed, as returned by `clip_state`; None for the initial state.
        names: Names of parameters for clip rules that need them; not needed where the optimizer's groups have them.
        group_names: Names of groups that a clip rule may refer to; None for those of the optimizer.
        shards: The flat shards of torch's first FSDP (`FlatShards.of(model)`); None without it.

    Attributes:
        steps: Number of steps so far, skipped ones included; known without waiting. Read it only.
        is_expecting: Whether a step was announced that has not happened. Read it only.

    Raises:
        TypeError: The optimizer is LBFGS, or is none of torch's and wraps none.
        ValueError: The clip rule refers to a group or parameter that does not exist, or needs whole rows of matrices,
            which flat shards do not have.

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
        optimizer = unwrap_optimizer(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times per step, so there is no single gradient to clip, check or "
                "measure. Use another optimizer, or remove clipping, guard and monitor."
            )
        self.optimizer = optimizer
        self.clipper = None if clip is None else Clipper(clip, clip_limit, self.param_names)
        self.detectors = tuple(detectors)
        self._names = names or {}
        self._shards = shards
        self.on_report = on_report
        self.report_due = report_due
        self.histograms = histograms
        counts = counts or StepCounts()
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self.steps = counts.steps
        self._counts = torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device=device)
        self._counts_on_host = HostMirror(self._counts)
        self._norms = Interval(device)
        self.is_expecting, self._may_be_left_out = False, True
        self._step: OneStep | None = None
        self._operands = operands_for(optimizer, may_skip=bool(self.detectors))
        if self.clipper is not None:
            self.clipper.load_state_dict(clip_state or {})
            known = set(group_names_of(optimizer)) if group_names is None else group_names
            self.clipper.rule.check(known, {name for name in self.param_names() if name is not None})
            if shards is not None and self.clipper.rule.reads_units:
                raise ValueError(
                    f"{clip!r} needs whole rows of matrices, but FSDP splits flattened parameters within rows. Use "
                    "FSDP2 (fully_shard, Lightning's ModelParallelStrategy), which splits between rows, or another "
                    "method."
                )
            if self._operands.skips_for_free and not any(isinstance(d, NonFiniteGradient) for d in self.detectors):
                self.detectors = (NonFiniteGradient(), *self.detectors)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(uncompiled(self._before)),
            optimizer.register_step_post_hook(uncompiled(self._after)),
        ]

    def close(self) -> None:
        """Remove the hooks and undo all changes to the optimizer."""
        while self._handles:
            self._handles.pop().remove()
        self._operands.restore()
        self._operands.close()
        # A scheduler still asks for the counts, and must not keep alive what the callbacks refer to: the Trainer, say.
        self._step, self.on_report, self.report_due, self.histograms = None, None, bool, tuple
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.forget_step()

    def param_names(self) -> list[str | None]:
        """Return the name of each parameter of the optimizer, in order, as far as known."""
        return [name for group in self.optimizer.param_groups for name in names_of(group, self._names)]

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer still has the hooks: calling its ``__init__`` anew, for one, drops them."""
        present = vars(self.optimizer)
        return all(
            handle.id in present.get(f"_optimizer_step_{which}_hooks", ())
            for handle, which in zip(self._handles, ("pre", "post"), strict=True)
        )

    def counts(self, exact: bool = False) -> StepCounts:
        """Return the numbers of steps, clipped and skipped.

        Args:
            exact: Whether to wait for the device; else clipped and skipped may lag a few steps on an accelerator.
        """
        self.settle()
        return StepCounts(self.steps, *map(int, self._counts.tolist() if exact else self._counts_on_host.read()))

    def skipped(self) -> int:
        """Return the number of skipped steps so far, as `counts` has it."""
        return self.counts().skipped

    def load_counts(self, counts: StepCounts) -> None:
        """Restore the counts returned by `counts`."""
        self.is_expecting = False
        self.steps = counts.steps
        self._counts.copy_(torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device="cpu"))
        self._counts_on_host.push()

    def clip_state(self) -> dict[str, Any]:
        """Return the state of the clip rule, as plain tensors for a checkpoint; empty if it has none."""
        return {} if self.clipper is None else self.clipper.state_dict()

    def load_clip_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `clip_state`."""
        if self.clipper is not None:
            self.clipper.load_state_dict(state)

    def expect_step(self, may_be_left_out: bool = True) -> None:
        """Announce a step: its gradients are ready.

        A GradScaler that found an overflow does not call the ``step`` of an optimizer without operands; an announced
        step that has not happened when the counts are next read, or the next step is announced, is counted as skipped.

        Args:
            may_be_left_out: Whether there is such a GradScaler. If not, a step that does not come is never counted, and
                `is_expecting` stays true.
        """
        self.settle()
        self.is_expecting, self._may_be_left_out = True, may_be_left_out

    def settle(self) -> None:
        """Count an announced step that did not happen as skipped."""
        if self.is_expecting and self._may_be_left_out:
            self.is_expecting = False
            if (step := self._open()) is not None:
                step.skip = torch.ones_like(self._counts[0], dtype=torch.float32)
                self._close(step)

    # One step, in order.

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Run the closure, measure, decide and hand over; torch runs the update next."""
        if self._step is not None:  # The last update was interrupted.
            self._operands.restore()
            self._step = None
        loss = None
        if closure_of(args, kwargs) is not None:
            args, kwargs, loss = run_closure(args, kwargs)
        elif not optimizer.state and is_trial_step(optimizer):
            return args, kwargs
        self.is_expecting = False
        step = self._step = self._open()
        if step is not None:
            try:
                step.hand_over(self._operands, loss)
            except StepSkipped:
                self._after(optimizer, args, kwargs)
                raise
        return args, kwargs

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count and report, after torch has run the update."""
        step, self._step = self._step, None
        if step is not None:
            self._operands.restore()
            self._close(step)

    def _open(self) -> OneStep | None:
        """Measure and decide; return None if there is no gradient, because then no step can happen."""
        scale, skip = self._operands.incoming()
        gradients = Gradients(self.optimizer, scale, self._names, self._shards)
        if not gradients.grads:
            return None
        reported = self.on_report is not None and self.report_due()
        step = OneStep(gradients, reported)
        step.skip = skip
        if self.clipper is not None:
            step.clip = self.clipper.decide(step.stats, self.steps, gradients.parameters, self._counts.device)
        for detector in self.detectors:
            flag = detector(step.stats).to(torch.float32)
            step.skip = flag if step.skip is None else torch.maximum(step.skip, flag)
        if step.skip is not None and not gradients.plain:
            step.skip = max_over_ranks(step.skip, gradients.params)
        if step.reported:
            step.measure_update(self.optimizer, self.histograms())
            _ = step.stats.norm_sq  # It must be read before clipping rewrites the gradients.
        return step

    def _close(self, step: OneStep) -> None:
        """Count the step, advance the state of rule and detectors, and report it."""
        self.steps += 1
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
            self.on_report(step.record(self.optimizer, self.steps, self._counts, self._norms.take()))
