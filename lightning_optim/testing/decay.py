"""The kind of weight decay, found by what it does."""

from __future__ import annotations

from typing import Any

import torch

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import change
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject

STRENGTH = 0.3


@check(
    why="The two kinds need values that differ a hundredfold, and the wrong sign lets weights grow.",
    fix="Decoupled: `param.mul_(1 - lr * weight_decay)` before the update. L2: `grad = grad.add(param, alpha=...)`.",
)
def weight_decay(subject: Subject) -> None:
    """`weight_decay` pulls the weights towards zero; its kind is noted: decoupled, L2 or another."""
    if not subject.has("weight_decay"):
        raise CheckSkipped("it has no weight_decay")
    start = subject.parameters(scale=1.0)
    grads = subject.gradients(start, 8)
    plain, decayed = _one(subject, grads, 0.0), _one(subject, grads, STRENGTH)
    if change(plain, decayed) is None:
        raise CheckFailed(f"weight_decay={STRENGTH} does nothing")
    subject.finite(decayed, f"with weight_decay={STRENGTH}")
    subject.fact("weight decay", _kind(subject, start, grads, decayed))


def _one(subject: Subject, grads: list[list[Any]], decay: float, l2: bool = False, **options: Any) -> list[Any]:
    """Return the parameters after some steps; with ``l2`` the decay is in the gradients that are given."""
    torch.manual_seed(0)
    params = subject.parameters(scale=1.0)
    optimizer = subject.make(params, weight_decay=0.0 if l2 else decay, **options)
    for each in grads:
        given = [g + decay * p.detach() for g, p in zip(each, params, strict=True)] if l2 else each
        subject.step(optimizer, params, given)
    return params


def _kind(subject: Subject, start: list[Any], grads: list[list[Any]], decayed: list[Any]) -> str:
    by_gradient = _one(subject, grads, STRENGTH, l2=True)
    if change(decayed, by_gradient, start=start, rtol=1e-3) is None:
        factor = _factor(subject, start, grads)
        same = factor is not None and change(decayed, _by_hand(subject, grads, factor), start=start, rtol=1e-3) is None
        return "L2, which is the same as decoupled here" if same else "L2"
    factor = _factor(subject, start, grads)
    if factor is None:
        return "another kind"
    if factor > 0:
        raise CheckFailed(f"weight_decay={STRENGTH} lets weights grow: by {factor:.2g} of their size in a step")
    lr = subject.value("lr") if subject.has("lr") else None
    if not isinstance(lr, float | int) or not lr:
        return "decoupled"
    halved = _factor(subject, start, grads, lr=lr / 2)
    if halved is None or abs(halved / factor - 0.5) > 0.1:
        return "decoupled, not scaled by lr"
    return "decoupled, scaled by lr"


def _by_hand(subject: Subject, grads: list[list[Any]], factor: float) -> list[Any]:
    """Return the parameters after steps without decay, each followed by a change by a fraction of their old size."""
    torch.manual_seed(0)
    params = subject.parameters(scale=1.0)
    optimizer = subject.make(params, weight_decay=0.0)
    for each in grads:
        before = [p.detach().clone() for p in params]
        subject.step(optimizer, params, each)
        with torch.no_grad():
            for param, old in zip(params, before, strict=True):
                param.add_(old, alpha=factor)
    return params


def _factor(subject: Subject, start: list[Any], grads: list[list[Any]], **options: Any) -> float | None:
    """Return by which fraction of their size weights change in the first step; None if it is no fraction."""
    first = grads[:1]
    with_, without = _one(subject, first, STRENGTH, **options), _one(subject, first, 0.0, **options)
    pulls = torch.cat([(a - b).detach().double().flatten() for a, b in zip(with_, without, strict=True)])
    weights = torch.cat([p.detach().double().flatten() for p in start])
    size = float(pulls.norm())
    if size == 0:
        return None
    factor = float(pulls @ weights / (weights @ weights))
    rounding = float(torch.finfo(torch.float32).eps * weights.norm())
    return factor if float((pulls - factor * weights).norm()) <= 0.02 * size + rounding else None
