"""Operands of one step: the ways in which a divisor and a skip flag reach the update of any optimizer.

There are two ways:

- An optimizer that declares ``_step_supports_amp_scaling`` takes both as device tensors in its kernel, through the
  attributes ``grad_scale`` (gradients are divided by it) and ``found_inf`` (if it is non-zero nothing changes, moments
  and step counters included). This is torch's protocol for GradScaler. The optimizers of this package take the divisor
  separately from the loss scale, as ``divisor``, which may have one value for each tensor.
- For every other optimizer the gradients are scaled in place, and a step to be skipped is not executed.

What the kernel does not take is applied to the gradients in place as well: a divisor for each row, a limit on elements,
and with torch's optimizers a divisor for each tensor. This is the only module that relies on the protocol.
"""

from __future__ import annotations

import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import Clip, Divisor
from lightning_optim.core.operands_flag import takes_operands
from lightning_optim.core.sharding import local
from lightning_optim.core.transfer import PendingValues

_LARGEST = torch.finfo(torch.float32).max
_ATTRIBUTES = ("grad_scale", "found_inf", "divisor")


class StepSkipped(Exception):  # noqa: N818 - control flow, not an error
    """Exception that leaves the ``step`` of an optimizer before its update.

    Args:
        loss: The result of the closure, which ``step`` then returns.
        optimizer: The optimizer whose ``step`` to leave; an optimizer inside it may be stepping.
    """

    def __init__(self, loss: Any, optimizer: Optimizer) -> None:
        super().__init__(  # A user sees this only if an optimizer was replaced after its `step` had been entered.
            "This step must be skipped, but `step` was entered before it could be wrapped. Replace an optimizer "
            "between two batches, for instance in on_train_epoch_start, not within one."
        )
        self.loss, self.optimizer = loss, optimizer


class StepOperands(ABC):
    """Way in which the clip decision and the skip flag of a step reach one optimizer."""

    skips_for_free: bool
    """Whether a step can be skipped without the host waiting for the device."""
    in_kernel: bool = False
    """Whether the kernel itself takes the flag, at the very end of a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def incoming(self) -> tuple[Tensor | None, Tensor | None]:
        """Return a GradScaler's loss scale, which the gradients still contain, and overflow flag, shape [] or None."""
        return getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)

    @abstractmethod
    def apply(self, grads: Sequence[Tensor], clip: Clip | None, skip: Tensor | None, loss: Any) -> None:
        """Hand over the clip decision and the flag, right before the update.

        Args:
            grads: All gradients, in the order of the clip rule's values.
            clip: The decision of the clip rule; None for no clipping.
            skip: Non-zero if the update must not happen, shape []; None if nothing can skip it.
            loss: The result of the closure, which a skipped ``step`` returns.

        Raises:
            StepSkipped: The update must not happen, and the optimizer takes no flag.
        """

    def restore(self) -> None:  # noqa: B027 - a subclass may have nothing to restore
        """Remove what `apply` has set, after the update or after an error in it; it may be called twice."""

    def close(self) -> None:  # noqa: B027
        """Undo all changes to the optimizer."""


def operands_for(optimizer: Optimizer, may_skip: bool) -> StepOperands:
    """Return the cheapest exact `StepOperands` for an optimizer.

    Args:
        optimizer: The optimizer.
        may_skip: Whether anything other than a GradScaler can skip a step.
    """
    if takes_operands(optimizer) and not _skip_forgets_momentum(optimizer):
        return InKernel(optimizer)
    return AroundStep(optimizer, may_skip)


class InKernel(StepOperands):
    """Operands that the optimizer's own kernel takes, without another pass over memory or a synchronisation."""

    skips_for_free = in_kernel = True

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._found: dict[str, Any] | None = None
        self._is_wide = any(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"])

    def apply(self, grads: Sequence[Tensor], clip: Clip | None, skip: Tensor | None, loss: Any) -> None:
        """Set the attributes; a loss scale that is already there is kept as a factor."""
        attributes = vars(self.optimizer)
        self._found = {key: attributes[key] for key in _ATTRIBUTES if key in attributes}
        scale = self._found.get("grad_scale")
        if isinstance(clip, Divisor) and hasattr(self.optimizer, "divisor"):
            # The optimizers of this package take a divisor for each tensor, in any precision.
            attributes["divisor"] = clip.values
        elif isinstance(clip, Divisor) and clip.values.dim() == 0 and not self._is_wide:
            # torch's kernels read the scale as float32, whatever the dtype of the parameters. An infinite one would
            # turn the update into 0, so it is bounded, and parameters in double precision do without it.
            values = clip.values if scale is None else scale * clip.values
            attributes["grad_scale"] = values.clamp(max=_LARGEST).to(torch.float32)
        elif clip is not None:
            clip.apply_([local(grad) for grad in grads], scale)
        if skip is not None:
            _allocate_momentum(self.optimizer)
            attributes["found_inf"] = skip

    def restore(self) -> None:
        """Restore the attributes that `apply` found, because a GradScaler deletes its own after the step."""
        if self._found is None:
            return
        attributes = vars(self.optimizer)
        for key in _ATTRIBUTES:
            attributes.pop(key, None)
        attributes.update(self._found)
        self._found = None


class AroundStep(StepOperands):
    """Operands for an optimizer that takes none: gradients are scaled in place, and a skipped step is not executed.

    Not updating is exact whatever state the optimizer keeps, but the host has to know the flag: free on the CPU, one
    synchronisation per step on an accelerator. There the flag is read only if a detector may request a skip.

    A step hook of torch can leave ``step`` only by an exception. Therefore ``optimizer.step`` is wrapped, on the
    instance, in a method that catches `StepSkipped` and nothing else.
    """

    def __init__(self, optimizer: Optimizer, may_skip: bool) -> None:
        super().__init__(optimizer)
        # A GradScaler calls an optimizer that declares operands even on an overflow. Such an optimizer is here because
        # its kernel would lose the momentum (`_skip_forgets_momentum`), so it has to be skipped from outside.
        self.skips_for_free = all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])
        self._may_skip = may_skip = may_skip or self.skips_for_free or takes_operands(optimizer)
        self._closed = False
        if may_skip:
            self._had = vars(optimizer).get("step")
            self._patch = _catch_skip(optimizer, self)
            optimizer.step = self._patch  # type: ignore[method-assign]

    def apply(self, grads: Sequence[Tensor], clip: Clip | None, skip: Tensor | None, loss: Any) -> None:
        """Scale the gradients in place, or raise `StepSkipped`."""
        if self._may_skip and skip is not None and PendingValues(skip.reshape(1)).read()[0]:
            raise StepSkipped(loss, self.optimizer)
        if clip is not None:
            clip.apply_([local(grad) for grad in grads], None)

    def close(self) -> None:
        """Remove the wrapper around ``step``; if it has been wrapped in turn, it stays and only forwards calls."""
        self._closed = True
        if self._may_skip and vars(self.optimizer).get("step") is self._patch:
            if self._had is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._had  # type: ignore[method-assign]


def _catch_skip(optimizer: Optimizer, operands: AroundStep) -> types.MethodType:
    inner = optimizer.step

    # torch's schedulers put marks on `step`, which `wraps` keeps, and look for the `__func__` of a bound method.
    @functools.wraps(inner)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except StepSkipped as skipped:
            if skipped.optimizer is not optimizer:
                raise
            return skipped.loss

    return types.MethodType(step, optimizer)


def _is_fused_momentum_sgd(group: dict[str, Any]) -> bool:
    return bool(group.get("fused")) and group.get("momentum", 0) != 0


def _skip_forgets_momentum(optimizer: Optimizer) -> bool:
    # torch's fused SGD starts the buffer with the undamped gradient, which a buffer of zeros cannot reproduce.
    return isinstance(optimizer, torch.optim.SGD) and any(
        _is_fused_momentum_sgd(group) and group["dampening"] != 0 for group in optimizer.param_groups
    )


def _allocate_momentum(optimizer: Optimizer) -> None:
    """Give torch's fused SGD momentum buffers of zeros before its first step.

    torch 2.13 allocates them uninitialised and fills them in the kernel, which does nothing on a skipped step: after a
    skip of the first step the next one uses uninitialised memory as momentum. Without dampening, zeros give the same
    first step.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if _is_fused_momentum_sgd(group):
            for param in group["params"]:
                if param.grad is not None and optimizer.state[param].get("momentum_buffer") is None:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param.grad)
