"""Checks of hyperparameters and groups."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import change, snapshot
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject, draw_by


@check(
    why="Schedules, group rules and users write hyperparameters into the groups in the middle of a run.",
    fix="Read `group['name']` inside `step`; keep nothing that was computed from it in __init__.",
)
def hyperparameters_live(subject: Subject) -> None:
    """A hyperparameter that acts when given to the constructor (but `initial_...`) acts when changed in the groups."""
    steps, switch = 8, 4
    grads = subject.gradients(subject.parameters(), steps)

    def run(name: str = "", value: Any = None, start: bool = False) -> list[Any]:
        torch.manual_seed(0)
        params = subject.parameters()
        optimizer = subject.make(params, **({name: value} if start else {}))
        for number, each in enumerate(grads):
            if number == switch and name and not start:
                for group in optimizer.param_groups:
                    group[name] = value
            subject.step(optimizer, params, each)
        return params

    usual = run()
    group = subject.make(subject.parameters()).param_groups[0]
    constructor = subject.arguments if subject.is_class else {}
    dead = []
    for name in sorted({*group, *constructor} - {"params"}):
        if name.startswith("initial_"):
            continue  # It is about the first step.
        if name not in group and any(key.startswith(name.rstrip("s")) for key in group):
            continue  # The groups have it under other names, as beta1 and beta2 for betas.
        old = group[name] if name in group else subject.options.get(name, constructor.get(name))
        suspect = False
        for value in _others(old):
            try:
                if name in group and change(run(name, value), usual) is not None:
                    suspect = False
                    break
                suspect |= name == "lr" or (
                    name in constructor and change(run(name, value, start=True), usual) is not None
                )
            except Exception:  # the value is out of its range, which is no question of this check
                continue
        if suspect:
            dead.append(name)
    if dead:
        raise CheckFailed(f"no effect when changed in the groups: {', '.join(dead)}")


def _others(value: Any) -> list[Any]:
    """Return other values that a hyperparameter may have."""
    if isinstance(value, float) or (type(value) is int and value in (0, 1)):  # weight_decay=0, lr=1
        return [value * 0.5, 0.05] if value else [0.05, 0.5, *([100] if type(value) is int else [])]  # a warmup of 0
    if type(value) is int:
        return [value + 1, 2 * value]
    if isinstance(value, tuple) and value and all(isinstance(v, float) for v in value):
        return [tuple(v * 0.5 for v in value)]
    return []


@check(
    why="A schedule that warms up from zero writes lr = 0 first; 0/0 makes all weights NaN at step one.",
    fix="Do not divide by lr or by a sum of past rates without a guard.",
)
def lr_zero(subject: Subject) -> None:
    """At lr = 0 the first step leaves the weights, and at the usual rate later ones move them."""
    lr = _rate(subject)
    params = subject.parameters()
    start = snapshot(params)
    optimizer = subject.make(params, **subject.without_decay())
    for group in optimizer.param_groups:
        group["lr"] = lr * 0
    grads = subject.gradients(params, 6)
    subject.run(params=params, grads=grads[:1], optimizer=optimizer)
    subject.finite(params, "after a step at lr = 0")
    subject.close(params, start, "a step at lr = 0 has moved the weights", start=start, rtol=0.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    subject.run(params=params, grads=grads[1:], optimizer=optimizer)
    subject.finite(params, "after a step at lr = 0 and five at the usual rate")
    subject.moved(params, start, "five steps at the usual rate after one at lr = 0")


@check(
    why="`torch.compile` and CUDA graphs need the rate as a tensor, which schedulers of torch write in place.",
    fix="Multiply by lr (`update.mul_(lr)`) where it may be a tensor; `alpha=lr` needs a number.",
)
def lr_tensor(subject: Subject) -> None:
    """Lr as a tensor does what the number does, also after it was written in place, or is refused by a clear error."""
    lr = _rate(subject)
    given = torch.tensor(float(lr), device=subject.device)
    params = subject.parameters()
    grads = subject.gradients(params, 4)
    try:
        optimizer = subject.make(params, lr=given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckSkipped(f"it refuses a tensor: {error}") from None
    subject.run(params=params, grads=grads[:2], optimizer=optimizer)
    rate = optimizer.param_groups[0]["lr"]
    if isinstance(rate, Tensor):
        rate.fill_(float(lr) / 2)
    subject.run(params=params, grads=grads[2:], optimizer=optimizer)
    other, wanted = subject.run(grads=grads[:2])
    if isinstance(rate, Tensor):
        for group in other.param_groups:
            group["lr"] = float(lr) / 2
        if abs(float(rate) / (float(lr) / 2) - 1) > 1e-6:
            raise CheckFailed(f"the steps have changed the tensor to {float(rate):.3g}")
    subject.run(params=wanted, grads=grads[2:], optimizer=other)
    subject.close(params, wanted, "lr as a tensor, halved in place after two steps", rtol=1e-4)


@check(
    why="A negative rate is a typing error that trains uphill without a word.",
    fix="`if not 0.0 <= lr: raise ValueError(f'Invalid learning rate: {lr}')` in __init__.",
)
def negative_lr(subject: Subject) -> None:
    """The class refuses a negative lr with a ValueError, or another error that names it."""
    lr = _rate(subject)
    if not subject.is_class or "lr" not in subject.arguments:
        raise CheckSkipped("the factory is no class that takes lr")
    try:
        subject.make(subject.parameters(), lr=-float(lr))
    except ValueError:
        return
    except Exception as error:
        words = set(re.split(r"\W+", str(error).lower()))
        if words & {"lr", "rate", "negative"}:
            return
        raise CheckFailed(f"a negative lr raises {type(error).__name__}, not ValueError: {error}") from error
    raise CheckFailed(f"lr={-float(lr):g} is accepted")


@check(
    why="Layers, heads and biases train at rates of their own; values of one group must not be used for another.",
    fix="Read hyperparameters inside the loop over `self.param_groups`.",
)
def group_options(subject: Subject) -> None:
    """A group with another lr trains at that rate, and the other groups do not notice."""
    lr = _rate(subject)
    shapes = ((4, 3), (4, 3))
    runs = []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        params = subject.parameters(shapes)
        groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": lr * factor}]
        subject.run(params=params, optimizer=subject.make(groups), grads=subject.gradients(params, 8))
        runs.append(params)
    if change(runs[0][1:], runs[1][1:]) is None:
        raise CheckFailed("a second group at a quarter of the rate moves as at the whole")
    start = subject.parameters(shapes)
    what = "the first group, when the second has another rate"
    # Loose, because some methods estimate one quantity over all groups; a rate that leaks changes the way fourfold.
    subject.close(runs[1][:1], runs[0][:1], what, start=start[:1], rtol=0.5)


@check(
    why="Groups are a way of writing; parameters with equal values must train as if they were in one.",
    fix="Keep what is counted (steps, averages) per parameter, or for all groups, not per first group.",
)
def two_groups(subject: Subject) -> None:
    """Groups with equal values train as one group does, and in another order of equal shapes as well."""
    _, wanted = subject.run(5)
    params = subject.parameters()
    optimizer = subject.make([{"params": [p]} for p in params])
    subject.run(params=params, optimizer=optimizer, grads=subject.gradients(params, 5))
    subject.close(params, wanted, "two groups against one", rtol=1e-4)
    if not _draws(subject):  # Random numbers are drawn for one parameter after another.
        shapes = ((4, 3), (4, 3))
        params, other = subject.parameters(shapes), subject.parameters(shapes)
        grads = subject.gradients(params, 5)
        subject.run(params=params, grads=grads)
        subject.run(params=other, grads=grads, optimizer=subject.make(other[::-1]))
        start = subject.parameters(shapes)
        subject.close(other, params, "parameters of one shape in the other order", start=start, rtol=1e-3)


def _draws(subject: Subject) -> bool:
    """Return whether a step draws random numbers."""
    states = []
    for draws in (True, False):
        params = subject.parameters()
        grads = subject.gradients(params, 1)
        if draws:
            subject.run(grads=grads, params=params)
        else:
            draw_by(grads[0])
        states.append(torch.random.get_rng_state())
    return not torch.equal(*states)


@check(
    why="Fine-tuning unfreezes layers by `add_param_group` in the middle of a run.",
    fix="Give every hyperparameter a default in `defaults`, and make state at a parameter's first step.",
)
def late_group(subject: Subject) -> None:
    """A group that is added after some steps gets all defaults and trains, with finite weights."""
    params = subject.parameters()
    late = subject.parameters(((2, 6),), seed=9)
    optimizer, _ = subject.run(3, params=params)
    optimizer.add_param_group({"params": late})
    if callable(train := getattr(optimizer, "train", None)):
        train()
    start = snapshot(late)
    both = [*params, *late]
    subject.run(params=both, grads=subject.gradients(both, 8), optimizer=optimizer)
    subject.finite(both, "after eight steps with a new group")
    subject.moved(late, start, "eight steps after it was added")
    missing = optimizer.param_groups[0].keys() - optimizer.param_groups[1].keys()
    if missing:
        raise CheckFailed(f"the new group has no {', '.join(sorted(missing))}")


@check(
    why="`model.parameters()` is a generator that can be read once; `named_parameters()` gives pairs since torch 2.6.",
    fix="Pass `params` to `super().__init__` first, and use `self.param_groups` from then on.",
)
def parameters_once(subject: Subject) -> None:
    """A generator of parameters, or of names and parameters, does what a list does."""
    torch.manual_seed(0)
    _, wanted = subject.run(3)
    for what in ("a generator", "a generator of names and parameters"):
        torch.manual_seed(0)
        params = subject.parameters()
        given = ((f"p{i}", p) for i, p in enumerate(params)) if "names" in what else (p for p in params)
        subject.run(params=params, optimizer=subject.make(given), grads=subject.gradients(params, 3))
        subject.same(params, wanted, what)


def _rate(subject: Subject) -> Any:
    lr = subject.value("lr")
    if lr is None or isinstance(lr, str):
        raise CheckSkipped(f"its lr is {lr!r}")
    return lr
