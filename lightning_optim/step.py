"""One optimizer step, one pass: measure, decide, apply, report.

A pipeline hangs on the public step hooks of one torch optimizer, so nothing else changes: ``optimizer.step()`` clips,
skips and measures by itself, in a plain loop, with a closure, under a GradScaler and under Lightning alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.clipping import ClipRule
from lightning_optim.divergence import Detector
from lightning_optim.measure import measure_norm_sq, measure_update
from lightning_optim.operands import StepSkipped, operands_for
from lightning_optim.stats import GradStats, StepCounts, StepRecord, StepStats
from lightning_optim.transfer import HostMirror

__all__ = ["StepPipeline"]


class StepPipeline:
    """Clips, guards and measures every step of one optimizer.

    The gradients are read once, whatever uses them, and not at all if nothing does. Clipping and skipping reach the
    update as described in `lightning_optim.operands`.

    Args:
        optimizer: The optimizer; not LBFGS, which evaluates its closure several times per step.
        clip: How gradients are clipped; None for not at all.
        detectors: What makes a step be skipped; any of them suffices.
        on_report: Receives the record of each step for which ``report_due`` said yes.
        report_due: Asked before each update whether to collect a record of it.
        counts: Where the counts start, on a resume.

    Raises:
        TypeError: The optimizer is LBFGS.

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
        detectors: Sequence[Detector] = (),
        on_report: Callable[[StepRecord], None] | None = None,
        report_due: Callable[[], bool] = lambda: True,
        counts: StepCounts | None = None,
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times per step, so there is no one gradient to clip, check or "
                "measure. Use another optimizer, or leave out clipping, guard and monitor."
            )
        self.optimizer = optimizer
        self.clip = clip
        self.detectors = tuple(detectors)
        self.on_report = on_report
        self.report_due = report_due
        counts = counts or StepCounts()
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self._steps = counts.steps
        self._counts = torch.tensor([counts.clipped, counts.skipped], dtype=torch.int64, device=device)
        self._counts_on_host = HostMirror(self._counts)
        self._expected = False
        self._step: _Step | None = None
        self._operands = operands_for(optimizer, may_skip=bool(self.detectors))
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
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
                step.skip = torch.ones_like(step.divisor if step.divisor is not None else self._counts[0])
                self._close(step)

    # One step, in order: `_before` runs the closure, measures, decides and hands over; the optimizer updates; `_after`
    # counts and reports.

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self._operands.restore()  # the last update may have been interrupted
        args, kwargs, loss = _run_closure(args, kwargs)
        self._expected = False
        step = self._step = self._open()
        if step is not None:
            try:
                self._operands.apply(step.grads, step.divisor if self.clip else None, step.skip, loss)
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
        step = _Step.of(self.optimizer, reported=self.on_report is not None and self.report_due())
        if not step.grads:
            return None
        scale, step.skip = self._operands.incoming()
        if self.clip or self.detectors or step.reported:
            step.measure(scale)
            if self.clip:
                step.divisor = self.clip(step.stats)
            for detector in self.detectors:
                flag = detector(step.stats).to(torch.float32)
                step.skip = flag if step.skip is None else torch.maximum(step.skip, flag)
        if step.reported:
            step.watch_update(self.optimizer)
        return step

    def _close(self, step: _Step) -> None:
        self._steps += 1
        if step.skip is not None:
            self._counts[1] += step.skip > 0
        if step.divisor is not None:
            clipped = step.divisor > 1
            self._counts[0] += clipped if step.skip is None else clipped & (step.skip == 0)
        self._counts_on_host.push()
        if step.reported:
            assert self.on_report is not None
            self.on_report(step.record(self.optimizer, self._steps, self._counts))


class _Step:
    """A step in the making: its tensors, and what has been measured and decided about it."""

    def __init__(self, params: list[Tensor], group_sizes: tuple[int, ...], reported: bool) -> None:
        self.params = params
        self.grads = [param.grad for param in params if param.grad is not None]
        self.group_sizes = group_sizes
        self.reported = reported
        self.divisor: Tensor | None = None
        self.skip: Tensor | None = None
        self._stats: GradStats | None = None
        self._before: list[Tensor] | None = None

    @classmethod
    def of(cls, optimizer: Optimizer, reported: bool) -> _Step:
        groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        return cls([p for group in groups for p in group], tuple(len(group) for group in groups), reported)

    @property
    def stats(self) -> GradStats:
        assert self._stats is not None, "measured before anything decides"
        return self._stats

    def measure(self, scale: Tensor | None) -> None:
        norm_sq = measure_norm_sq(self.grads)
        if scale is not None:  # the loss scale is still in the gradients
            norm_sq = norm_sq / scale.to(norm_sq.device).square()
        self._stats = GradStats(norm_sq, self.group_sizes)

    def watch_update(self, optimizer: Optimizer) -> None:
        if hasattr(optimizer, "collect_step_stats"):
            optimizer.collect_step_stats = True
        else:
            self._before = [param.detach().clone() for param in self.params]

    def record(self, optimizer: Optimizer, steps: int, counts: Tensor) -> StepRecord:
        if self._before is not None:
            numel = tuple(param.numel() for param in self.params)
            sums = measure_update(self._before, self.params)
            if self.skip is not None:  # as our own optimizers say it: there was no update
                sums = sums.masked_fill(self.skip > 0, torch.nan)
            update = StepStats(sums, self.group_sizes, numel)
        else:
            update = optimizer.step_stats  # type: ignore[attr-defined]
            optimizer.collect_step_stats = False  # type: ignore[attr-defined]
        zero = torch.zeros_like(self.stats.norm_sq[0])
        return StepRecord(
            group_names=tuple(str(group.get("name", index)) for index, group in enumerate(optimizer.param_groups)),
            hyperparameters=tuple(
                {key: value for key, value in group.items() if key not in ("params", "param_names")}
                for group in optimizer.param_groups
            ),
            grad=self.stats,
            divisor=zero + 1 if self.divisor is None else self.divisor,
            skip=zero if self.skip is None else self.skip,
            update=update,
            steps=steps,
            counts=counts.clone(),
        )


def _run_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Runs the closure now, because gradients exist only afterwards, and leaves one that returns the known loss.

    Args:
        args: Positional arguments of ``step``, the optimizer first.
        kwargs: Its keyword arguments.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return args, kwargs, None
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}, loss
    return (args[0], lambda: loss, *args[2:]), kwargs, loss
