"""One optimizer step, one pass: measure, decide, apply, report.

A pipeline is a pre-hook and a post-hook of one torch optimizer, so that ``optimizer.step()`` itself clips, skips and
measures: in a plain loop, with a closure, under a GradScaler and under Lightning alike. This is the path of a gradient,
in the order of the calls:

1. The optimizer evaluates its closure; `StepPipeline._evaluated` is called when the gradients of this step are there.
2. `StepPipeline._open` collects them (`step/gradients.py`), asks the clip rule for a divisor (`clipping/`) and the
   detectors for a skip flag (`divergence/`). Each of these reads `GradStats`, where a quantity is measured on first
   use.
3. `OneStep.hand_over` and `StepOperands.apply` (`step/operands.py`) hand divisor and flag to the update, as tensors on
   the device.
4. The optimizer updates its parameters with ``grad / divisor``, unless it skips (`kernels/`, for the optimizers of this
   package).
5. `StepPipeline._after` counts, advances the state of rule and detectors, and reports (`step/one_step.py`).

An optimizer that steps by another one inside it (`step/evaluations.py`) has hooks on both: a step to skip is left at
the outer one, before anything has changed, and 3 to 5 happen around the inner one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.clipping import Clipper, ClipRule
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.interval import Interval
from lightning_optim.core.operands_flag import takes_operands
from lightning_optim.core.stats import StepCounts, StepRecord
from lightning_optim.core.step_hooks import after_closure, calls_already, closure_of, is_trial_step
from lightning_optim.core.typed import typed
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.divergence import Detector, NonFiniteGradient
from lightning_optim.optim import FusedOptimizer
from lightning_optim.step.decision import Decision
from lightning_optim.step.evaluations import Evaluations, updating_optimizer
from lightning_optim.step.gradients import Gradients, group_names_of, names_of
from lightning_optim.step.known_gradients import forget
from lightning_optim.step.one_step import OneStep
from lightning_optim.step.operands import AroundStep, StepOperands, StepSkipped, operands_for

__all__ = ["StepPipeline"]


@typed(own=("optimizer",))
class StepPipeline:
    """Clip, guard and measure every step of one optimizer.

    The gradients are read once, however many of these need them, and not at all if none does. Clipping and skipping
    reach the update as described in `lightning_optim.step.operands`. With a clip rule, a step with a gradient that is
    not finite is skipped wherever the host need not wait for the flag; elsewhere (on an accelerator, with an optimizer
    that takes no operands) a detector has to request the skip.

    An optimizer that evaluates its closure several times per step and updates by another one inside it, as
    sharpness-aware minimization does (``SAM(base)``), is clipped, guarded and measured around the step of that one,
    with the gradients of the last evaluation. One that updates by itself is clipped at each evaluation, as Lightning's
    own clipping does; a detector is refused, because such a step cannot be left half done.

    Args:
        optimizer: The optimizer, or what Fabric's ``setup`` makes of it. LBFGS only without ``clip``, ``detectors`` and
            ``on_report``: it evaluates its closure at many points of a line, so that no gradient is that of the step.
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
        TypeError: The optimizer is LBFGS, and its gradients are to be clipped, checked or measured; or it is none of
            torch's and wraps none.
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
        self.optimizer = optimizer
        self._updates = updating_optimizer(optimizer)
        self._has_inner = self._updates is not optimizer
        needs_gradients = clip is not None or bool(detectors) or on_report is not None
        if isinstance(self._updates, torch.optim.LBFGS) and needs_gradients:
            raise TypeError(
                f"{type(self._updates).__name__} evaluates its closure several times per step, so there is no single "
                "gradient to clip, check or measure. Use another optimizer, or remove clipping, guard and monitor."
            )
        self.clipper = None if clip is None else Clipper(clip, clip_limit, self.param_names)
        self.detectors = tuple(detectors)
        self._names = names or {}
        self._shards = shards
        self.on_report = on_report
        self.report_due = report_due
        self.histograms = histograms
        counts = counts or StepCounts()
        devices = (p.device for group in optimizer.param_groups for p in group["params"])
        device = next(devices, torch.device("cpu"))  # none yet, or Lightning's stand-in for no optimizer
        self.steps = counts.steps
        self._norms = Interval(device)
        self.is_expecting, self._may_be_left_out = False, True
        self._step: OneStep | None = None
        self._operands = operands_for(self._updates, may_skip=bool(self.detectors))
        self._outer: StepOperands | None = None
        if self._has_inner:
            self._outer = AroundStep(optimizer, may_skip=bool(self.detectors))
        self._is_guarded = bool(self.detectors)
        self._evaluations = Evaluations(optimizer, tracks=self._has_inner or clip is not None or bool(detectors))
        self._repeats_said = False
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
        self._decision = Decision(self.clipper, self.detectors, counts, device)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(uncompiled(self._before)),
            optimizer.register_step_post_hook(uncompiled(self._after_outer if self._has_inner else self._after)),
        ]
        if self._has_inner:
            self._handles += [
                self._updates.register_step_pre_hook(uncompiled(self._before_inner)),
                self._updates.register_step_post_hook(uncompiled(self._after)),
            ]

    def close(self) -> None:
        """Remove the hooks and undo all changes to the optimizer."""
        while self._handles:
            self._handles.pop().remove()
        self._operands.restore()
        if self._outer is not None:
            self._outer.close()
        self._operands.close()
        # A scheduler still asks for the counts, and must not keep alive what the callbacks refer to: the Trainer, say.
        self._step, self.on_report, self.report_due, self.histograms = None, None, bool, tuple
        forget(self._updates)
        for optimizer in (self.optimizer, self._updates):
            if isinstance(optimizer, FusedOptimizer):
                optimizer.forget_step()

    def param_names(self) -> list[str | None]:
        """Return the name of each parameter of the optimizer, in order, as far as known."""
        return [name for group in self.optimizer.param_groups for name in names_of(group, self._names)]

    @property
    def is_attached(self) -> bool:
        """Whether the optimizer still has the hooks: calling its ``__init__`` anew, for one, drops them."""
        present = vars(self.optimizer)
        return all(
            handle.id in present.get(f"_optimizer_step_{which}_hooks", ())
            for handle, which in zip(self._handles[:2], ("pre", "post"), strict=True)
        )

    def counts(self, exact: bool = False) -> StepCounts:
        """Return the numbers of steps, clipped and skipped.

        Args:
            exact: Whether to wait for the device; else clipped and skipped may lag a few steps on an accelerator.
        """
        self.settle()
        return StepCounts(self.steps, *self._decision.numbers(exact))

    def skipped(self) -> int:
        """Return the number of skipped steps so far, as `counts` has it."""
        return self.counts().skipped

    @property
    def is_evaluating(self) -> bool:
        """Whether a step is under way in which the closure has been evaluated already."""
        return self._evaluations.count > 0

    def load_counts(self, counts: StepCounts) -> None:
        """Restore the counts returned by `counts`."""
        self.is_expecting = False
        self.steps = counts.steps
        self._decision.load(counts)

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

    def has_gradients(self) -> bool:
        """Return whether any parameter has a gradient."""
        return any(param.grad is not None for group in self._updates.param_groups for param in group["params"])

    def discard_announced(self) -> None:
        """Forget a step that was announced and will not come, because an exception has ended the run before it."""
        self.is_expecting = False

    def settle(self) -> None:
        """Count an announced step that did not happen as skipped."""
        if not (self.is_expecting and self._may_be_left_out):
            return
        self.is_expecting = False
        if (step := self._open(left_out=True)) is not None:
            self._close(step)
        else:  # Its gradients have been dropped by now, as in manual optimization.
            self.steps += 1
            self._decision.count_left_out()

    # One step, in order.

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Begin a step, which goes on when its gradients are there."""
        closure = closure_of(args, kwargs)
        if calls_already(closure, self._evaluated):
            return args, kwargs  # a `super().step(closure)` within it
        if self._step is not None:  # The last update was interrupted.
            self._operands.restore()
            self._step = None
        if closure is None and not optimizer.state and is_trial_step(optimizer):
            return args, kwargs
        self._evaluations.begin(watch=self._has_inner or closure is not None)
        return after_closure(args, kwargs, self._evaluated)

    def _evaluated(self, loss: Any) -> None:
        """Measure, decide and hand over: gradients are there, and the optimizer goes on from them."""
        self._evaluations.count += 1
        self._operands.restore()
        if self._operands.in_kernel and not takes_operands(self._updates):
            # Its first gradients have shown that the kernel it was made for does not take them.
            self._operands = operands_for(self._updates, may_skip=self._is_guarded)
        self.is_expecting = False
        earlier, self._step = self._step, None
        can_leave = self._evaluations.nothing_has_changed()
        if self._has_inner and not can_leave:
            return  # The step inside opens it, with the gradients that are there by then.
        step = self._step = self._open()
        if step is None:
            return
        if earlier is not None:
            step.continues(earlier)
        if self._outer is None:
            if not can_leave:
                self._check_half_done(step)
            self._hand_over(step, loss)
            return
        try:
            self._outer.apply([], None, step.skip, loss)
        except StepSkipped:
            self._after(self.optimizer, (), {})
            raise

    def _before_inner(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Begin the step of the optimizer inside, which is the update."""
        if is_trial_step(optimizer, closure_of(args, kwargs)):
            return args, kwargs
        return after_closure(args, kwargs, self._update_follows)

    def _update_follows(self, loss: Any) -> None:
        """Decide and hand over to the step inside; measure first, unless the only evaluation has been measured."""
        self._operands.restore()
        self.is_expecting = False
        if self._step is None:
            self._step = self._open()
        if self._step is not None:
            self._hand_over(self._step, loss)

    def _hand_over(self, step: OneStep, loss: Any) -> None:
        try:
            step.hand_over(self._operands, loss)
        except StepSkipped:
            self._after(self._updates, (), {})
            raise

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count and report, after torch has run the update."""
        step, self._step = self._step, None
        self._evaluations.count = 0
        if step is not None:
            self._operands.restore()
            self._close(step)

    def _after_outer(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End a step of an optimizer that steps by another one, which has been counted with that."""
        step, self._step = self._step, None
        self._evaluations.count = 0
        if step is not None and self._evaluations.have_moved():
            inner = type(self._updates).__name__
            raise RuntimeError(
                f"{type(optimizer).__name__} has changed parameters without a step of the {inner} inside it, so that "
                "nothing has clipped, guarded or monitored the update. Needed is one that updates by the `step` of the "
                "optimizer that it holds, or one that holds none."
            )

    def _check_half_done(self, step: OneStep) -> None:
        """Refuse what cannot be had where the weights are not those that the step began with, and no step is inside."""
        if self._operands.in_kernel:
            return
        label = type(self.optimizer).__name__
        why = (
            f"{label} evaluates its closure more than once per step, or after it has moved the weights, and updates "
            "them by itself: left out in between, such a step would leave them where they are no weights of the run."
        )
        if self._is_guarded:
            raise RuntimeError(
                f"A guard cannot leave out steps of {label}. {why} Needed is an optimizer that steps by one inside it, "
                "such as SAM(params, base_optimizer), or a run without DivergenceGuard."
            )
        if step.skip is not None and bool(step.skip):
            raise RuntimeError(f"A gradient is not finite at the last evaluation of the closure. {why}")
        if self.clipper is not None and not self._repeats_said:
            self._repeats_said = True
            warnings.warn(
                f"{label} evaluates its closure more than once per step and updates the parameters by itself: the "
                "gradients of each evaluation are clipped, as Lightning's own clipping does.",
                stacklevel=2,
            )

    def _open(self, left_out: bool = False) -> OneStep | None:
        """Measure and decide; return None if there is no gradient, because then no step can happen.

        Args:
            left_out: Whether it is known that the step does not happen.
        """
        scale, incoming = self._operands.incoming()
        gradients = Gradients(self._updates, scale, self._names, self._shards)
        if not gradients.grads:
            return None
        if left_out:
            incoming = torch.ones_like(self._decision.counts[0], dtype=torch.float32)
        step = OneStep(gradients, self.on_report is not None and self.report_due())
        self._decision.open(step, incoming, self.steps)
        if step.reported:
            step.measure_update(self._updates, self.histograms())
            _ = step.stats.norm_sq  # It must be read before clipping rewrites the gradients.
        return step

    def _close(self, step: OneStep) -> None:
        """Count the step, advance the state of rule and detectors, and report it."""
        self.steps += 1
        norm = self._decision.close(step)
        if self.on_report is None:
            return
        if norm is not None:
            self._norms.add(norm)
        if step.reported:
            self.on_report(step.record(self._updates, self.steps, self._decision.counts, self._norms.take()))
