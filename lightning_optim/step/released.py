"""Updates in the backward pass: each parameter as soon as its gradient is there, which is then dropped.

The pipeline of such an optimizer has one hook more for each parameter. What a step decides for all tensors together is
decided for each tensor here; the optimizer's own ``step`` has no update left, and ends the step: it counts, reports,
and lets schedules move on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.clipping import ClipRule
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.stats import STEP_SUMS, GradStats, StepCounts, StepRecord, StepStats
from lightning_optim.core.step_hooks import after_closure, calls_already, closure_of, is_trial_step
from lightning_optim.core.typed import typed
from lightning_optim.core.wrappers import unwrap_optimizer
from lightning_optim.divergence import Detector, NonFiniteGradient
from lightning_optim.optim import FusedOptimizer
from lightning_optim.step import release_limits, released_state
from lightning_optim.step.gradients import group_names_of
from lightning_optim.step.last_norm import LastNorm
from lightning_optim.step.pipeline import StepPipeline
from lightning_optim.step.released_param import ReleasedParam, Taken


@typed(own=("optimizer",))
class ReleasedPipeline(StepPipeline):
    """Update each parameter in the backward pass as soon as its gradient is there, and drop the gradient.

    See `release_gradients`, which makes one. The arguments that are not described here are those of `StepPipeline`.

    Args:
        optimizer: An optimizer of `lightning_optim.optim`.
        skip_nonfinite: Whether a tensor whose gradient is not finite is left out; always so with a clip rule.
        use_last_norm: Whether a clip rule that needs the norm of all gradients uses an estimate (`LastNorm`).

    Attributes:
        left_out: Number of updates of single tensors that were left out, int64, shape [], on the device.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        clip: ClipRule | None = None,
        clip_limit: Callable[[int], float] | None = None,
        detectors: Collection[Detector] = (),
        on_report: Callable[[StepRecord], None] | None = None,
        report_due: Callable[[], bool] = lambda: True,
        histograms: Callable[[], Collection[str]] = tuple,
        counts: StepCounts | None = None,
        clip_state: Mapping[str, Any] | None = None,
        names: Mapping[Tensor, str] | None = None,
        group_names: Collection[str] | None = None,
        shards: FlatShards | None = None,
        skip_nonfinite: bool = True,
        use_last_norm: bool = False,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        release_limits.check_optimizer(optimizer)
        assert isinstance(optimizer, FusedOptimizer)
        if optimizer._updates_in_backward:
            raise ValueError(f"The gradients of this {type(optimizer).__name__} are released already.")
        release_limits.check_rule(clip, use_last_norm)
        release_limits.check_detectors(tuple(detectors))
        release_limits.check_processes((p for group in optimizer.param_groups for p in group["params"]), shards)
        super().__init__(
            optimizer,
            clip=clip,
            detectors=[NonFiniteGradient()] if skip_nonfinite else (),
            on_report=on_report,
            report_due=report_due,
            histograms=histograms,
            counts=counts,
            names=names,
            group_names=group_names,
        )
        self._fused_optimizer = optimizer
        self._clip_limit = clip_limit
        device = self._decision.counts.device
        self._norm = LastNorm(device) if use_last_norm else None
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)
        self._params: dict[Tensor, ReleasedParam] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._layout: list[tuple[int, int]] | None = None
        self._taken: dict[Tensor, Taken] = {}
        self._is_open = self._is_reported = False
        self._hooks: list[RemovableHandle] = []
        self._saved: released_state.Saved = released_state.Saved({})
        self.load_clip_state(clip_state or {})
        self._locate()
        optimizer._updates_in_backward = True
        for param in self._places:
            self._hook(param)

    # In the backward pass.

    def _hook(self, param: Tensor) -> None:
        """Have a parameter updated as soon as it has a gradient; one that needs none is hooked when it has one."""
        if param in self._params or not param.requires_grad:
            return
        group, index = self._place(param)
        names: list[str] = group.get("param_names") or []
        name = names[index] if names else self._names.get(param)
        clip = None if self.clipper is None else self.clipper.rule
        one = ReleasedParam(self._fused_optimizer, param, name, clip, self._clip_limit, self.detectors)
        if one.clipper is not None:
            one.clipper.load_state_dict(self._saved.of(name, self._position(param)))
        self._params[param] = one
        this = weakref.ref(self)  # The parameter must not keep the optimizer alive.

        def use(param: Tensor) -> None:
            if (pipeline := this()) is not None:
                pipeline._use(param)

        self._hooks.append(param.register_post_accumulate_grad_hook(use))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _use(self, param: Tensor) -> None:
        if not self._is_open:
            self._begin()
        one = self._params[param]
        if one.is_used:
            raise RuntimeError(
                f"{self._label(param)} has a second gradient before {type(self.optimizer).__name__}.step(), and was "
                "updated with the first one in the backward pass. Gradients that are released cannot be accumulated "
                "over several backward passes. Call optimizer.step() after each, or add up the losses and call "
                "backward once; or keep the gradients."
            )
        group, index = self._place(param)
        self._taken[param] = one.use(group, index, self.steps, self._is_reported, self._norm)

    def _begin(self) -> None:
        """Begin a step with its first gradient."""
        self._locate()
        release_limits.check_processes(self._places, None)
        self._fused_optimizer.begin_in_backward()
        self._is_reported = self.on_report is not None and self.report_due()
        if self._is_reported:
            release_limits.check_histograms(self.histograms())
        self._is_open = True

    def _locate(self) -> None:
        """Find each parameter in the groups, which may have been replaced or extended."""
        groups = self.optimizer.param_groups
        layout = [(id(group), len(group["params"])) for group in groups]
        if layout == self._layout:
            return
        release_limits.check_optimizer(self.optimizer)
        self._places = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        self._layout = layout

    def _place(self, param: Tensor) -> tuple[dict[str, Any], int]:
        group, index = self._places[param]
        return self.optimizer.param_groups[group], index

    def _position(self, param: Tensor) -> int:
        group, index = self._places[param]
        return sum(size for _, size in (self._layout or [])[:group]) + index

    def _label(self, param: Tensor) -> str:
        group, index = self._place(param)
        name = self._names.get(param)
        return f"parameter {name!r}" if name else self._fused_optimizer.label(group, index)

    # In the optimizer's own step.

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        closure = closure_of(args, kwargs)
        if calls_already(closure, self._evaluated) or (closure is None and is_trial_step(optimizer)):
            return args, kwargs
        release_limits.check_scaler(optimizer)
        return after_closure(args, kwargs, self._evaluated)

    def _evaluated(self, loss: Any) -> None:
        """Use the gradients of parameters that had no hook, and refuse others that are left."""
        self._evaluations.count += 1
        self.is_expecting = False
        left = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if left:
            self._locate()
        for param in left:
            if param in self._params:
                raise RuntimeError(
                    f"{self._label(param)} has a gradient at {type(self.optimizer).__name__}.step(), though gradients "
                    "are used and dropped in the backward pass: it was not computed by `backward`, but set by other "
                    "code, such as DistributedDataParallel or an assignment. Let backward compute it, or keep the "
                    "gradients."
                )
            self._hook(param)  # It has joined the optimizer, or has been unfrozen.
            self._use(param)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """End the step: count and report."""
        self._evaluations.count = 0
        if not self._is_open:
            return
        self._is_open = False
        taken = [(param, self._taken[param]) for param in self._places if param in self._taken]
        self._taken = {}
        for one in self._params.values():
            one.is_used = False
        self.steps += 1
        flags = [one.flags for _, one in taken if one.flags is not None]
        skip = None
        if flags:
            clipped, left_out = torch.stack(flags).unbind(1)
            self.left_out = self.left_out + left_out.sum()
            skip = left_out.min()  # Where every tensor was left out, nothing has changed.
            self._decision.add(torch.stack([clipped.max(), skip]))
        if self._norm is not None:
            self._norm.end()
        norms = [one.norm_sq for _, one in taken if one.norm_sq is not None]
        if self.on_report is None:
            return
        if norms:
            self._norms.add(torch.cat(norms).sum().sqrt())
        if self._is_reported and taken:
            self.on_report(self._record(taken, skip))

    def _record(self, taken: list[tuple[Tensor, Taken]], skip: Tensor | None) -> StepRecord:
        groups = self.optimizer.param_groups
        sizes = [0] * len(groups)
        for param, _ in taken:
            sizes[self._places[param][0]] += 1
        norm_sq = torch.cat([one.norm_sq for _, one in taken])  # type: ignore[misc] # measured in a reported step
        known = dict(zip((p for g in groups for p in g["params"]), self.param_names(), strict=True))
        empty = norm_sq.new_full((1, len(STEP_SUMS)), torch.nan)
        sums = torch.cat([empty if one.sums is None else one.sums.to(norm_sq.device) for _, one in taken])
        return StepRecord(
            group_names=group_names_of(self.optimizer),
            hyperparameters=tuple(
                {key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups
            ),
            grad=GradStats(norm_sq, tuple(sizes)),
            clipped_norm_sq=torch.cat([one.clipped_norm_sq for _, one in taken]),  # type: ignore[misc]
            skip=torch.zeros_like(norm_sq[0]) if skip is None else skip.to(norm_sq.dtype),
            update=StepStats(sums, tuple(sizes), tuple(one.numel for _, one in taken)),
            steps=self.steps,
            counts=self._decision.counts.clone(),
            param_names=tuple(known[param] for param, _ in taken),
            norms=self._norms.take(),
        )

    # What others ask of a pipeline.

    def has_gradients(self) -> bool:
        """Return whether any parameter has had a gradient since the last step."""
        return self._is_open or super().has_gradients()

    def settle(self) -> None:
        """Do nothing: no step can be left out after its updates."""

    def clip_state(self) -> dict[str, Any]:
        """Return the state of the clip rule for all parameters, as plain tensors for a checkpoint."""
        if self.clipper is None:
            return {}
        self._locate()
        return released_state.joined(
            self.clipper.rule, self.param_names(), [self._params.get(p) for p in self._places], self._saved, self._norm
        )

    def load_clip_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `clip_state`, of this class or of `StepPipeline`."""
        if self.clipper is None:
            return
        self._saved = released_state.Saved(state, type(self.clipper.rule).__name__)
        if self._norm is not None and self._saved.last_norm_sq is not None:
            self._norm.load(self._saved.last_norm_sq)
        for param, one in self._params.items():
            assert one.clipper is not None
            one.clipper.load_state_dict(self._saved.of(self._names_at(param), self._position(param)))

    def _names_at(self, param: Tensor) -> str | None:
        return self.param_names()[self._position(param)]

    def remove(self) -> None:
        """Keep gradients again, and update in the optimizer's ``step``; the same as `close`."""
        self.close()

    def close(self) -> None:
        """Remove all hooks and undo all changes to the optimizer."""
        while self._hooks:
            self._hooks.pop().remove()
        self._fused_optimizer._updates_in_backward = False
        for one in self._params.values():
            one.close()
        super().close()
