"""Checks of the direction: does it descend, and with which sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject, normal

RATES = (1.0, 0.1, 0.01, 10.0, 100.0)
"""Factors on the learning rate that are tried in this order; at one of them an optimizer must descend."""


@check(
    why="An optimizer that cannot lower a quadratic loss has a wrong sign, or does not use its gradients.",
    fix="Subtract the update (`param.add_(update, alpha=-lr)`), and read `param.grad` anew at each step.",
)
def descent_convex(subject: Subject) -> None:
    """100 steps lower a convex loss, at the given learning rate or within a factor of 100."""
    targets = normal([(4, 3), (3, 5)], 11)

    def loss(params: Sequence[Tensor]) -> Tensor:
        return sum(
            ((p - t.to(p)).square().sum() for p, t in zip(params, targets, strict=True)),
            start=params[0].new_zeros(()),
        )

    _descends(subject, loss, 100, "convex loss")


@check(
    why="In a curved valley, wrong bias correction, wrong averages or wrong eps show as growth of the loss.",
    fix="Compare the first steps with the paper's formula by hand (argument `reference` of check_optimizer).",
)
def descent_curved(subject: Subject) -> None:
    """150 steps lower Rosenbrock's function, at the given learning rate or within a factor of 100."""

    def loss(params: Sequence[Tensor]) -> Tensor:
        total = params[0].new_zeros(())
        for p in params:
            flat = p.flatten()
            total = total + (5 * (flat[1:] - flat[:-1].square()).square() + (1 - flat[:-1]).square()).sum()
        return total / 10

    _descends(subject, loss, 150, "Rosenbrock's function")


def _descends(subject: Subject, loss: Callable[[Sequence[Tensor]], Tensor], steps: int, what: str) -> None:
    """Check that some steps lower a loss, at one of a few rates; each method calls another rate a usual one.

    Raises:
        CheckFailed: They do not.
    """
    seen = []
    has_rate = subject.has("lr") and isinstance(subject.value("lr"), float | int | Tensor)
    for factor in RATES if has_rate else RATES[:1]:
        params = subject.parameters()
        try:
            optimizer = subject.make(params, **({"lr": subject.value("lr") * factor} if factor != 1.0 else {}))
        except ValueError:
            continue  # The rate is out of the optimizer's range.
        first = float(loss(params))

        def closure(params: Sequence[Tensor] = params) -> Tensor:
            for p in params:
                p.grad = None
            with torch.enable_grad():
                value = loss(params)
                value.backward()  # type: ignore[no-untyped-call]
            return value

        for _ in range(steps):
            subject.evaluate(optimizer, closure)
        last = float(loss(params))
        if last < first * (1 - 1e-6):
            return
        seen.append(f"{first:.3g} to {last:.3g} at {factor:g} * lr")
    raise CheckFailed(f"{what} went from {', '.join(seen)}")


@check(
    why="With the wrong sign every step goes uphill.",
    fix="Subtract lr times the update; if `maximize` is supported, change the sign of the gradient, not of lr.",
)
def sign(subject: Subject) -> None:
    """Steps with equal gradients go against them."""
    start = subject.parameters()
    grads = subject.gradients(start, 1)
    _, params = subject.run(grads=grads * 8, **subject.without_decay())  # Rectified methods wait some steps.
    pairs = list(zip(params, start, grads[0], strict=True))
    total = sum(float(((p - s).double() * g.double()).sum()) for p, s, g in pairs)
    if total == 0 and all(torch.equal(p, s) for p, s, _ in pairs):
        raise CheckFailed("eight steps with equal gradients have changed nothing")
    if not total < 0:
        raise CheckFailed(f"eight steps with equal gradients have gone with them: inner product {total:.2g}")


@check(
    why="`maximize=True` is torch's word for ascent; an option that is accepted and ignored trains the wrong way.",
    fix="At the start of the update: `grad = -grad if group['maximize'] else grad`, before weight decay.",
)
def maximize(subject: Subject) -> None:
    """`maximize=True` does the same as gradients of the opposite sign, also with weight decay."""
    if not subject.has("maximize"):
        raise CheckSkipped("it has no option 'maximize'")
    params = subject.parameters()
    grads = subject.gradients(params, 4)
    negated = [[-g for g in each] for each in grads]
    ways: list[dict[str, Any]] = [{}, *([{"weight_decay": 0.1}] if subject.has("weight_decay") else [])]
    for decay in ways:
        _, wanted = subject.run(grads=negated, **decay)
        _, found = subject.run(grads=grads, maximize=True, **decay)
        what = f"maximize=True against gradients of the opposite sign{', with weight decay' if decay else ''}"
        subject.close(found, wanted, what, rtol=1e-5)


@check(
    why="A gradient of exactly zero is common (dead units, unused rows); 0/0 makes the weight NaN for good.",
    fix="Add eps to the denominator, outside of the square root, and do not divide by a norm that may be 0.",
)
def zero_gradient(subject: Subject) -> None:
    """Gradients of zero, from the first step on, leave finite weights, and later gradients move them."""
    start = subject.parameters()
    zeros = [[torch.zeros_like(p) for p in start]] * 2
    optimizer, params = subject.run(grads=zeros)
    subject.finite(params, "after two gradients of zero")
    before = [p.detach().clone() for p in params]
    subject.run(grads=subject.gradients(params, 4), optimizer=optimizer, params=params)
    subject.finite(params, "after two gradients of zero and four others")
    subject.moved(params, before, "after two gradients of zero and four others")


@check(
    why="Gradients are tiny at the end of training and huge at its start; float32 squares overflow from 2e19 on.",
    fix="Keep eps small against the gradients, and do not square what may be huge without need.",
)
def gradient_scale(subject: Subject) -> None:
    """Gradients of 1e-6 and of 1e6 times the usual size leave finite weights; whether the scale matters is noted."""
    start = subject.parameters()
    ways = {}
    for factor in (1.0, 8.0, 1e-6, 1e6):
        _, params = subject.run(grads=subject.gradients(start, 4, scale=factor), **subject.without_decay())
        subject.finite(params, f"with gradients times {factor:g}")
        ways[factor] = torch.cat([(p - s).detach().flatten().double() for p, s in zip(params, start, strict=True)])
    once, eight = ways[1.0], ways[8.0]
    size = float(once.abs().max())
    if float((eight - once).abs().max()) <= 0.01 * size:
        kind = "invariant"
    elif float((eight - 8 * once).abs().max()) <= 0.01 * 8 * size:
        kind = "linear"
    else:
        kind = "neither"
    subject.fact("gradient scale", kind)
