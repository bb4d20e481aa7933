"""Groups that are frozen at first: their parameters are in the optimizer from the start, and are trained later."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.core.step_hooks import after_closure, closure_of, is_trial_step
from lightning_optim.core.uncompiled import uncompiled
from lightning_optim.optim import FusedOptimizer

_ATTRIBUTE = "_lightning_optim_freezing"
"""Where an optimizer has its `Freezing`. Not in a table of them all: it knows the schedule, which knows the optimizer,
so that neither would ever be freed."""


class Freezing:
    """Freezes the groups of an optimizer that have a ``frozen_until``, until then.

    A frozen parameter has no gradient when the optimizer steps, so it is neither updated nor decayed, counts in no
    norm, and has no state: its moments start fresh. Whether a group is frozen follows from the number of steps alone,
    and so is right after a resume.

    As soon as it is known that a group is frozen, its parameters need no gradient (``requires_grad=False``), which
    saves their part of the backward pass. Not in distributed runs: DistributedDataParallel decides at its start which
    gradients it reduces, so there they are computed and dropped. Under FSDP2, checkpoints have fresh state of frozen
    parameters too, because torch.distributed.checkpoint loads none without state; so the optimizer must be one of
    `lightning_optim.optim`, which can make fresh state.

    Args:
        optimizer: The optimizer; its groups may have a ``frozen_until``, a `Duration` in text.
        steps: Returns how many steps the schedule has taken.
        horizon: Returns the length of the run; None as long as it is not known.

    Raises:
        ValueError: On starting: under FSDP2, with another package's optimizer.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([{"params": [weight], "frozen_until": "2 steps"}], lr=0.5)
        >>> taken = 0
        >>> freezing = Freezing(optimizer, steps=lambda: taken, horizon=Horizon)
        >>> for taken in range(4):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        ...     print(weight.item())
        1.0
        1.0
        0.5
        0.0
    """

    def __init__(self, optimizer: Optimizer, steps: Callable[[], int], horizon: Callable[[], Horizon | None]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._steps = steps
        self.horizon = horizon
        self._until: dict[str, int] | None = None
        self._measured: Horizon | None = None
        self._flags = {id(p): p.requires_grad for _, p in self._temporary()}
        # Until it is known how far the run is, too many gradients are better than too few: a step drops what it must.
        for _, param in self._temporary():
            param.requires_grad_(True)
        optimizer.register_step_pre_hook(uncompiled(self._before_step))
        optimizer.register_step_post_hook(uncompiled(self._after_step))
        optimizer.register_state_dict_pre_hook(self._before_saving)
        setattr(optimizer, _ATTRIBUTE, self)

    def start(self) -> None:
        """Ask for the length of the run and freeze what is frozen at the next step.

        Raises:
            ValueError: A frozen parameter is sharded (FSDP2), and the optimizer is another package's; or a group would
                be frozen to the end of the run.
        """
        optimizer = self._optimizer()
        for group, param in self._temporary():
            if _is_dtensor(param) and not isinstance(optimizer, FusedOptimizer):
                raise ValueError(
                    f"The group {group.get('name')!r} is frozen until {group['frozen_until']!r} and its parameters are "
                    f"in shards (FSDP2). A checkpoint of {type(optimizer).__name__} from that time could not be "
                    "loaded: torch.distributed.checkpoint takes up no parameter without state. Use an optimizer of "
                    "lightning_optim.optim, which can make it, or leave out frozen_until."
                )
        horizon = self.horizon()
        if horizon is not None:
            for until, name in {group["frozen_until"]: group.get("name") for group, _ in self._temporary()}.items():
                duration = Duration.parse(until)
                if duration.is_relative and horizon.total_steps is None:
                    return  # The first step names the group and what is missing.
                check_frozen_until(str(name), until, horizon)
            self._measure(horizon)
            self._spare(self._steps())

    def _measure(self, horizon: Horizon) -> None:
        """Convert each ``frozen_until`` into steps; what has been thawed stays so, however long the run becomes."""
        before, steps = self._until or {}, self._steps()
        names = {group["frozen_until"] for group, _ in self._temporary()}
        self._until = {
            name: before[name] if steps >= before.get(name, steps + 1) else Duration.parse(name).steps(horizon)
            for name in names
        }
        self._measured = horizon

    def release(self) -> None:
        """Restore the original ``requires_grad`` of parameters that are still frozen."""
        for group, param in self._temporary():
            if self._is_frozen(group, self._steps()):
                param.requires_grad_(self._flags.get(id(param), True))

    def _temporary(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        optimizer = self._optimizer()
        assert optimizer is not None, "hooks of an optimizer that is gone"
        for group in optimizer.param_groups:
            if group.get("frozen_until") is not None:
                yield from ((group, param) for param in group["params"])

    def _is_frozen(self, group: dict[str, Any], steps: int) -> bool:
        if self._until is None:
            raise RuntimeError(
                f"The group {group.get('name')!r} is frozen until {group['frozen_until']!r}, and the length of the run "
                "is not known. Give OptimizerFactory.build a Horizon, or resolve the scheduler before the first step."
            )
        return steps < self._until[group["frozen_until"]]

    def _spare(self, steps: int) -> None:
        """Require the gradients that the step after ``steps`` steps may need, and no others."""
        if _is_distributed():
            return
        for group, param in self._temporary():
            frozen = self._is_frozen(group, steps)
            if param.requires_grad == frozen:
                param.requires_grad_(not frozen)
                if frozen:
                    param.grad = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._until is None:
            if is_trial_step(optimizer, closure_of(args, kwargs)):
                return None
            self.start()
        elif (horizon := self.horizon()) is not None and horizon is not self._measured:
            self._measure(horizon)
        steps = self._steps()
        frozen = [param for group, param in self._temporary() if self._is_frozen(group, steps)]
        if not any(param.requires_grad or param.grad is not None for param in frozen):
            return None

        def drop(_: Any) -> None:
            for param in frozen:
                param.grad = None

        drop(None)  # some optimizers move the weights along the gradients that lie there, and evaluate then
        return after_closure(args, kwargs, drop)

    def _before_saving(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, FusedOptimizer) and optimizer.state:
            optimizer.make_state(param for _, param in self._temporary() if _is_dtensor(param))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The schedule counts this step in a moment, unless it was skipped; then one gradient more is computed and
        # dropped. What comes after it may be the first batch of an accumulation, so it cannot wait.
        if self._until is not None and any(True for _ in self._temporary()):
            self._spare(self._steps() + 1)


def check_frozen_until(name: str, frozen_until: str, horizon: Horizon) -> None:
    """Refuse a group that would be frozen to the end of the run; a trial run is too short to say so.

    Args:
        name: Name of the group.
        frozen_until: Its ``frozen_until``.
        horizon: Length of the run.

    Raises:
        ValueError: It ends at the end of the run, or later.
    """
    steps, total = Duration.parse(frozen_until).steps(horizon), horizon.total_steps
    if total is not None and steps >= total and not horizon.is_trial:
        raise ValueError(
            f"The group {name!r} is frozen until {frozen_until!r}, which is step {steps:,}, and the run ends after "
            f"{total:,}: it would never be trained. Needed is an earlier end, or requires_grad=False."
        )


def freezing_of(optimizer: Optimizer) -> Freezing | None:
    """Return the `Freezing` of an optimizer, or None."""
    found: Freezing | None = vars(optimizer).get(_ATTRIBUTE)
    return found


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _is_dtensor(param: Tensor) -> bool:
    return hasattr(param, "placements")
