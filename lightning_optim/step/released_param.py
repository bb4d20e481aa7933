"""One parameter that is updated as soon as the backward pass has its gradient: decided, updated, measured alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import Clipper, ClipRule, Divisor
from lightning_optim.core.stats import StepCounts
from lightning_optim.divergence import Detector
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.one_param import OneParam
from lightning_optim.step.decision import Decision
from lightning_optim.step.gradients import Gradients
from lightning_optim.step.last_norm import LastNorm, LastNormStats
from lightning_optim.step.one_step import OneStep
from lightning_optim.step.operands import InKernel


@dataclass(frozen=True)
class Taken:
    """What is left of a gradient that has been used.

    Args:
        flags: Whether it was clipped, and whether its update was left out, int64, shape [2]; None if neither is known.
        norm_sq: Its square sum, shape [1]; None if it was not measured.
        clipped_norm_sq: That after clipping, shape [1]; None without a report.
        sums: Sums of the update, shape [1, columns of `STEP_SUMS`]; None without a report.
        numel: Number of its elements over all shards.
    """

    flags: Tensor | None
    norm_sq: Tensor | None
    clipped_norm_sq: Tensor | None
    sums: Tensor | None
    numel: int


class ReleasedParam:
    """The part of a pipeline for one parameter.

    Args:
        optimizer: The optimizer.
        param: Its parameter.
        name: Name of the parameter; None if it is not known.
        clip: The clip rule; None for no clipping.
        clip_limit: Factor on its limit by the step; None for 1.
        detectors: What may leave out the update.

    Attributes:
        param: The parameter.
        clipper: The clip rule and its state for this parameter; None for no clipping.
        is_used: Whether its gradient of this step has been used.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        param: Tensor,
        name: str | None,
        clip: ClipRule | None,
        clip_limit: Callable[[int], float] | None,
        detectors: Sequence[Detector],
    ) -> None:
        self.param, self.is_used = param, False
        self.clipper = None if clip is None else Clipper(clip, clip_limit, lambda: [name])
        self._names: Mapping[Tensor, str] = {} if name is None else {param: name}
        self._view = OneParam(optimizer, param)
        # It has what is asked for here of an optimizer: groups, state, and the attributes of operands.
        self._optimizer = cast(Optimizer, self._view)
        self._operands = InKernel(self._optimizer)
        alone = clip is None or clip.spans == "tensor"
        self._decision = Decision(self.clipper, detectors, StepCounts(), param.device, fused=alone, mirrored=False)

    def use(self, group: dict[str, Any], index: int, steps: int, reported: bool, norm: LastNorm | None) -> Taken:
        """Update the parameter with its gradient, and drop that.

        Args:
            group: The parameter's group.
            index: Its index there.
            steps: Optimizer steps so far.
            reported: Whether the step is reported.
            norm: Estimate of the global norm; None for none.

        Returns:
            What is left of the gradient.

        Raises:
            RefusedError: The gradient or the state cannot be used for an update.
        """
        self._view.follow(group, index)
        gradients = Gradients(self._optimizer, None, self._names)
        step = OneStep(gradients, reported, None if norm is None else LastNormStats(gradients, norm))
        before = self._decision.counts
        self._decision.open(step, None, steps)
        if norm is not None:
            norm.add(step.stats.norm_sq)
        if reported:
            step.measure_update(self._optimizer, ())
            _ = step.stats.norm_sq  # It must be read before clipping rewrites the gradient.
        if step.clip is not None and not isinstance(step.clip, Divisor):
            # It is about to be rewritten, and its memory may be that of a gradient that others are computed from.
            self.param.grad = gradients.grads[0].clone()
            gradients.grads = [self.param.grad]
        try:
            step.hand_over(self._operands, None)
            self._view.update()
        finally:
            self._operands.restore()
            self._view.collect_step_stats = False
        self._decision.close(step)
        self.is_used, self.param.grad = True, None
        after, stats = self._decision.counts, self._view.step_stats
        return Taken(
            flags=None if after is before else after - before,
            norm_sq=step.stats.norm_sq if step.stats.norm_sq_is_read else None,
            clipped_norm_sq=step.clipped_norm_sq,
            sums=None if stats is None else stats.sums,
            numel=self.param.numel(),
        )

    def close(self) -> None:
        """Let go of what is kept from the last update to make the next one quicker."""
        self._view.forget()
