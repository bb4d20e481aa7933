"""Helpers for hooks around `Optimizer.step`: running the closure, and recognising trial steps.

torch calls step pre-hooks before the closure, so a hook that needs gradients acts when the closure returns. The closure
stays the optimizer's to evaluate: when it will, and as often. Sharpness-aware minimization evaluates it again at other
weights, LBFGS along a line, schedule-free optimizers after they have moved the weights.

`torch.distributed.checkpoint` makes a trial step to create the state of an optimizer: to save or load an optimizer in
shards it needs tensors to load into, so if there is no state yet, it fills `p.grad` with zeros, sets every `lr` to 0
and calls ``step(closure=None)``. This is not a training step: weights must not change, nothing may count it, and when a
run is resumed it happens before the data are set up and after the weights are loaded. A hook that sets learning rates,
decays weights or counts steps must check `is_trial_step` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.placements import PLAIN, gradient_of
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.sizes import span


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the closure among the arguments of ``step``, whose first is the optimizer; None if there is none."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[Any], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call ``then`` whenever the gradients of a step are there: now, or at the end of each evaluation of the closure.

    Once per evaluation: torch calls the hooks anew for a ``super().step(closure)`` within a step, and the closure that
    comes with it calls ``then`` already.

    Args:
        args: Positional arguments of ``step``, the optimizer first.
        kwargs: Its keyword arguments.
        then: Called with the loss that the closure has returned; with None where there is no closure. A method, so that
            it is known again.

    Returns:
        The arguments for ``step``, positional and by keyword, as a pre-hook returns them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> _ = optimizer.register_step_pre_hook(lambda _, args, kwargs: after_closure(args, kwargs, print))
        >>> optimizer.step(lambda: 0.25)
        0.25
        0.25
    """
    closure = closure_of(args, kwargs)
    if closure is None:
        then(None)
        return args, kwargs
    if calls_already(closure, then):
        return args, kwargs
    if "closure" in kwargs:
        return args, {**kwargs, "closure": _Evaluation(closure, then)}
    return (args[0], _Evaluation(closure, then), *args[2:]), kwargs


def calls_already(closure: Any, then: Callable[[Any], None]) -> bool:
    """Whether `after_closure` has made this closure call ``then``: it belongs to a step that is under way."""
    while isinstance(closure, _Evaluation):
        if closure.then == then:
            return True
        closure = closure.closure
    return False


class _Evaluation:
    """A closure, and what to do with the gradients of each of its evaluations."""

    def __init__(self, closure: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.closure, self.then = closure, then

    def __call__(self) -> Any:
        loss = self.closure()
        self.then(loss)
        return loss


def is_trial_step(optimizer: Optimizer, closure: Any = None) -> bool:
    """Return whether the next step only creates state: there is none yet, and all learning rates and gradients are 0.

    A training step that looks the same, such as the first one of a warmup from 0 with zero gradients, would change
    nothing but step counts. Gradients are read, and the host waits for them, only if all other conditions hold.

    Args:
        optimizer: The optimizer, with its gradients in place.
        closure: The closure given to ``step``; a step with a closure is never a trial step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.0)
        >>> weight.grad = torch.zeros(1)
        >>> is_trial_step(optimizer)
        True
        >>> optimizer.step()
        >>> is_trial_step(optimizer)
        False
    """
    if closure is not None or optimizer.state:
        return False
    if not all(_is_zero(group["lr"]) for group in optimizer.param_groups if "lr" in group):
        return False
    found = (gradient_of(param) for group in optimizer.param_groups for param in group["params"])
    grads = [grad for grad in found if grad is not None]
    return bool(grads) and not any(_has_value(grad) for grad in grads)


def _is_zero(lr: float | Tensor | None) -> bool:
    """Return whether a learning rate is 0; False for one on a device, as trial steps set plain numbers.

    Adafactor of other libraries has None where it computes its rate itself.
    """
    return lr is not None and not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0


def _has_value(grad: Tensor) -> bool:
    """Return whether any element differs from 0, over all shards, so that all ranks agree."""
    here = local(grad)
    if not _has_memory(here):  # torch would read it nevertheless; the step handles such gradients.
        count = torch.ones((), dtype=torch.int64, device=here.device)
    else:
        count = torch.count_nonzero(here.coalesce().values() if here.is_sparse else here)
    return bool(sum_over_shards(count.reshape(1), [grad]))


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor holds all its elements; FSDP empties some between steps."""
    if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.numel() == 0:
        return True
    needed = tensor.storage_offset() * tensor.element_size() + span(tensor)
    return tensor.untyped_storage().nbytes() >= needed
