"""Checks of `step(closure)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.subject import CheckFailed, Subject, draw_by


@check(
    why="Trainers compute forward and backward inside the closure; each further call is another batch's work.",
    fix="Call the closure exactly once, before reading gradients, unless the method needs several evaluations.",
)
def closure_once(subject: Subject) -> None:
    """`step(closure)` calls the closure once, also at the second step."""
    calls = _closures(subject, 2)[0]
    if calls != [1, 1]:
        raise CheckFailed(f"calls in two steps: {calls[0]} and {calls[1]}")


@check(
    why="Lightning and plain loops take the loss from `step(closure)` for logging and progress.",
    fix="End with `return loss`, where `loss = closure()` under `torch.enable_grad()`, else None.",
)
def closure_loss(subject: Subject) -> None:
    """`step(closure)` returns what the closure returns."""
    returned = _closures(subject, 2)[1]
    for value in returned:
        if not isinstance(value, Tensor | float) or float(value) != 5.0:
            raise CheckFailed(f"the closure has returned 5.0, the step {value!r}")


@check(
    why="Under `torch.no_grad()` the closure's loss has no graph, and `backward` fails or does nothing.",
    fix="`with torch.enable_grad(): loss = closure()` inside a step decorated with `@torch.no_grad()`.",
)
def closure_grad_enabled(subject: Subject) -> None:
    """Gradients are enabled inside the closure, and afterwards as they were before."""
    params = subject.parameters()
    optimizer = subject.make(params)
    modes = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        for param, grad in zip(params, subject.gradients(params, 1)[0], strict=True):
            param.grad = grad
        return torch.tensor(5.0, device="cpu")

    optimizer.step(closure)
    if not modes or not all(modes):
        raise CheckFailed("gradients are disabled inside the closure" if modes else "the closure is not called")
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        raise CheckFailed("gradients are disabled after the step")


@check(
    why="Gradients that were read before the closure ran are those of the last batch.",
    fix="Call the closure first, then collect `param.grad`.",
)
def closure_gradients(subject: Subject) -> None:
    """The step uses the gradients that the closure has made, not those from before it."""
    _, wanted = subject.run(3)
    params = subject.parameters()
    optimizer = subject.make(params)
    for grads in subject.gradients(params, 3):
        for param in params:
            param.grad = torch.full_like(param, -3.0)

        def closure(grads: list[Tensor] = grads) -> Tensor:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            draw_by(grads)
            return torch.zeros((), device="cpu")

        optimizer.step(closure)
    subject.same(params, wanted, "with a closure against gradients made before the step")


def _closures(subject: Subject, steps: int) -> tuple[list[int], list[Any]]:
    """Return how often each step calls its closure, and what it returns."""
    params = subject.parameters()
    optimizer = subject.make(params)
    calls, returned = [], []
    for grads in subject.gradients(params, steps):
        count = 0

        def closure(grads: list[Tensor] = grads) -> Tensor:
            nonlocal count
            count += 1
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            draw_by(grads)
            return torch.tensor(5.0, device="cpu")

        returned.append(optimizer.step(closure))
        calls.append(count)
    return calls, returned
