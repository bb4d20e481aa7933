"""Checks under this package's clipping, guard and monitor."""

from __future__ import annotations

from typing import Any

import torch

from lightning_optim.clipping import GlobalNorm
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step import StepPipeline
from lightning_optim.testing.check import check
from lightning_optim.testing.compare import difference, snapshot
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject


def _piped(subject: Subject, optimizer: Any, **options: Any) -> StepPipeline:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CheckSkipped("LBFGS has no single gradient to clip, check or measure")
    return StepPipeline(optimizer, **options)


@check(
    why="Clipping acts at the end of the closure; gradients that were read before it are not clipped.",
    fix="Read `param.grad` inside `step`, after the closure, and nowhere else.",
)
def clipping(subject: Subject) -> None:
    """Under GradientClipping the run is that with gradients clipped by hand, and each clipped step is counted."""
    grads = subject.gradients(subject.parameters(), 5)
    limit = 0.7 * float(torch.cat([g.flatten() for g in grads[0]]).norm())
    clipped, count = [], 0
    for each in grads:
        norm = float(torch.cat([g.flatten() for g in each]).double().norm())
        count += norm > limit
        clipped.append([g * min(1.0, limit / norm) for g in each])
    _, wanted = subject.run(grads=clipped)
    params = subject.parameters()
    optimizer = subject.make(params)
    pipeline = _piped(subject, optimizer, clip=GlobalNorm(max_norm=limit))
    subject.run(params=params, grads=grads, optimizer=optimizer)
    subject.close(params, wanted, "clipped by the pipeline against clipped by hand", rtol=1e-3)
    counts = pipeline.counts(exact=True)
    pipeline.close()
    if (counts.steps, counts.clipped) != (len(grads), count):
        raise CheckFailed(f"{counts.clipped} of {counts.steps} steps counted as clipped, not {count} of {len(grads)}")


@check(
    why="A guard that skips a step must leave no trace of it in weights, state or counts.",
    fix="Change weights and state in `step` only, through the instance on which `step` is called.",
)
def guard(subject: Subject) -> None:
    """A step with a NaN that DivergenceGuard skips changes nothing, and the rest goes as if it had not been."""
    grads = subject.gradients(subject.parameters(), 5)
    torch.manual_seed(0)
    _, wanted = subject.run(grads=grads)
    params = subject.parameters()
    torch.manual_seed(0)
    optimizer = subject.make(params)
    pipeline = _piped(subject, optimizer, detectors=[NonFiniteGradient()])
    for number, each in enumerate(grads):
        if number == 2:
            before, state = snapshot(list(params)), snapshot(optimizer.state_dict())
            subject.step(optimizer, params, [torch.full_like(g, float("nan")) for g in each])
            subject.same(params, before, "a skipped step has changed a weight")
            if (found := difference(state, optimizer.state_dict(), "state_dict()")) is not None:
                raise CheckFailed(f"after a skipped step {found}")
        subject.step(optimizer, params, each)
    counts = pipeline.counts(exact=True)
    pipeline.close()
    subject.close(params, wanted, "a run with one skipped step against one without it", rtol=1e-5)
    if (counts.steps, counts.skipped) != (6, 1):
        raise CheckFailed(f"{counts.skipped} of {counts.steps} steps counted as skipped, not 1 of 6")


@check(
    why="Update norms show a rate that is too high or too low before the loss does.",
    fix="Register nothing that changes gradients or weights outside of `step`.",
)
def monitor(subject: Subject) -> None:
    """Measured by OptimizerMonitor's pipeline, the run is the same and every step is reported."""
    torch.manual_seed(0)
    _, wanted = subject.run(4)
    torch.manual_seed(0)
    params = subject.parameters()
    optimizer = subject.make(params)
    records: list[Any] = []
    pipeline = _piped(subject, optimizer, on_report=records.append)
    subject.run(4, params=params, optimizer=optimizer)
    pipeline.close()
    subject.close(params, wanted, "a measured run against a plain one", rtol=1e-5)
    if len(records) != 4:
        raise CheckFailed(f"{len(records)} reports of 4 steps")
