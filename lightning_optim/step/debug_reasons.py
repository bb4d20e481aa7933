"""Why a tensor did not move in a step under observation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lightning_optim.step.debug_rows import Before


@dataclass
class RunFacts:
    """What the step showed as a whole.

    Args:
        has_closure: Whether a closure was given.
        calls: How often the optimizer evaluated it.
    """

    has_closure: bool
    calls: int
    found_inf: bool = False
    nothing_changed: bool = False
    any_not_finite: bool = False
    wrote_gradients: list[str] = field(default_factory=list)
    moved_storages: list[str] = field(default_factory=list)
    not_finite_after: list[str] = field(default_factory=list)


def why_unchanged(before: Before, state_changed: bool, facts: RunFacts) -> str:
    """Return the reason why a tensor was not changed, in words.

    Args:
        before: The tensor, with the gradient that the step had.
        state_changed: Whether its state was changed nevertheless.
        facts: What the step showed as a whole.
    """
    if before.param.numel() == 0:
        return "it has no elements"
    if not before.param.requires_grad:
        return "requires_grad is False"
    if facts.has_closure and not facts.calls:
        return "the closure was not called"
    if before.grad is None:
        return "no gradient"
    if before.lr == 0:
        frozen = "frozen_until" in before.group
        return "its group is frozen: lr is 0" if frozen else "lr is 0"
    if facts.found_inf:
        return "found_inf is set: the step was skipped"
    if facts.nothing_changed and facts.any_not_finite:
        return "a gradient is not finite: the step was skipped"
    if before.grad_kind == "zero":
        return "the gradient is zero"
    info = torch.finfo(before.param.dtype)
    tiny = before.lr * float(before.grad.to_dense().norm()) < info.eps * float(before.weight.norm())
    if tiny or (state_changed and info.bits < 32):
        return f"the update is below the resolution of {str(before.param.dtype)[6:]}"
    return "the optimizer did not change it" + ("" if state_changed else ", nor its state")
