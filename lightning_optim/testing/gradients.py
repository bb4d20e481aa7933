"""Checks of what an optimizer does with gradients besides following them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import snapshot
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject, draw_by


@check(
    why="Frozen layers and unused heads have no gradient; a step must not fail on them or decay them.",
    fix="Start the loop with `if param.grad is None: continue`, and make state at the first gradient.",
)
def none_gradients(subject: Subject) -> None:
    """A parameter without gradient stays as it is, and moves once it has one."""
    params = subject.parameters(((4, 3), (3, 5), (2, 2)))
    start = snapshot(params)
    grads = subject.gradients(params, 16)
    decay: dict[str, Any] = {"weight_decay": 0.1} if subject.has("weight_decay") else {}
    optimizer, _ = subject.run(params=params, grads=[[each[0], None, each[2]] for each in grads[:8]], **decay)
    subject.same([params[1]], [start[1]], "a parameter without gradient has changed")
    subject.moved([params[0], params[2]], [start[0], start[2]], "the others")
    subject.run(params=params, grads=grads[8:], optimizer=optimizer)
    subject.finite(params, "after the first gradients of one parameter at the ninth step")
    subject.moved([params[1]], [start[1]], "its first gradients at the ninth step")


@check(
    why="A step without any gradient happens after a skipped batch, or for the optimizer of a part that is frozen.",
    fix="Do not stack or take the norm of an empty list; return where there is nothing to do.",
)
def no_gradients(subject: Subject) -> None:
    """A step without any gradient changes nothing and raises nothing."""
    params = subject.parameters()
    start = snapshot(params)
    optimizer, _ = subject.run(params=params, grads=[[None] * len(params)])
    subject.same(params, start, "a step without gradients has changed a parameter")
    subject.run(params=params, grads=subject.gradients(params, 8), optimizer=optimizer)
    subject.moved(params, start, "gradients after such a step")


@check(
    why="What reads gradients after the step (logging, accumulation over steps) sees other numbers.",
    fix="Use `grad = grad.add(param, alpha=weight_decay)` in place of `grad.add_(...)`; no in-place method on grad.",
)
def gradients_unchanged(subject: Subject) -> None:
    """The step leaves `param.grad` as it was, also with weight decay and `maximize`: the same values."""
    ways: list[dict[str, Any]] = [{}]
    if subject.has("weight_decay"):
        ways.append({"weight_decay": 0.1})
    if subject.has("maximize"):
        ways.append({"maximize": True})
    for options in ways:
        params = subject.parameters()
        optimizer = subject.make(params, **options)
        named = "".join(f" with {name}={value}" for name, value in options.items())
        for number, grads in enumerate(subject.gradients(params, 3)):
            subject.step(optimizer, params, grads)
            found = [p.grad for p in params]
            if any(g is None for g in found):
                raise CheckFailed(f"the step has set gradients to None{named}")
            subject.same([g for g in found if g is not None], grads, f"gradients after step {number + 1}{named}")


@check(
    why="`zero_grad(set_to_none=False)`, and backends that keep gradients in buffers, overwrite them in place.",
    fix="Clone a gradient that the state keeps: `state['momentum'] = grad.clone()`.",
)
def gradients_not_kept(subject: Subject) -> None:
    """The state does not share memory with `param.grad`: overwriting a gradient later changes nothing."""
    _, wanted = subject.run(5)
    params = subject.parameters()
    optimizer = subject.make(params)
    for grads in subject.gradients(params, 5):
        subject.step(optimizer, params, grads, fresh=False)
        for param in params:
            if param.grad is not None:
                param.grad.fill_(7.0)
    subject.same(params, wanted, "with gradients overwritten after each step")


@check(
    why="Gradients that `zero_grad` leaves are added to those of the next batch.",
    fix="Do not override `zero_grad`, or keep torch's two ways of it.",
)
def zero_grad(subject: Subject) -> None:
    """`zero_grad()` sets gradients to None, and `zero_grad(set_to_none=False)` to zeros."""
    optimizer, params = subject.run(1)
    optimizer.zero_grad(set_to_none=False)
    if any(p.grad is None or bool(p.grad.any()) for p in params):
        raise CheckFailed("set_to_none=False leaves other gradients than zeros")
    subject.step(optimizer, params, subject.gradients(params, 1)[0])
    optimizer.zero_grad()
    if any(p.grad is not None for p in params):
        raise CheckFailed("zero_grad() leaves gradients that are not None")


@check(
    why="A tied embedding or a transposed view gives gradients whose strides are not the parameter's.",
    fix="Update by torch's operations on the tensors; a kernel over raw memory has to look at the strides.",
)
def gradient_layout(subject: Subject) -> None:
    """A gradient with other strides than its parameter has the same effect."""
    params = subject.parameters()
    grads = subject.gradients(params, 4)
    _, wanted = subject.run(grads=grads)
    optimizer = subject.make(params)
    for each in grads:

        def closure(each: list[Tensor] = each) -> Tensor:
            for param, grad in zip(params, each, strict=True):
                param.grad = grad.t().contiguous().t()
            draw_by(each)
            return torch.zeros((), device="cpu")

        subject.evaluate(optimizer, closure)
    subject.close(params, wanted, "gradients that are transposed in memory", rtol=1e-5)


@check(
    why="`nn.Embedding(sparse=True)` gives sparse gradients; read as if dense they fail in the middle of training.",
    fix="Raise in step: `if grad.is_sparse: raise RuntimeError('... does not support sparse gradients')`.",
)
def sparse_gradients(subject: Subject) -> None:
    """A sparse gradient, with a row listed twice, moves exactly its rows downhill, or is refused by a clear error."""
    weight = torch.nn.Parameter(subject.parameters(((4, 3),))[0].detach())
    rows = torch.ones(3, 3, device=subject.device)
    # As of nn.Embedding for a batch that has a word twice: the row is listed twice, and its gradient is the sum.
    grad = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]], device=subject.device), rows, (4, 3))

    def closure(optimized: torch.nn.Parameter = weight, joined: bool = False) -> Tensor:
        optimized.grad = grad.coalesce() if joined else grad.clone()
        return torch.zeros((), device="cpu")

    start = weight.detach().clone()
    options = subject.without_decay()
    try:
        optimizer = subject.make([weight], **options)
        for _ in range(2):
            subject.evaluate(optimizer, closure)
    except Exception as error:
        if "sparse" not in str(error).lower() and "layout" not in str(error).lower():
            raise CheckFailed(f"the error does not say that sparse gradients are the reason: {error!r:.200}") from error
        subject.fact("sparse gradients", "refused")
        raise CheckSkipped("it refuses sparse gradients") from None
    subject.finite([weight], "after sparse gradients")
    if not torch.equal(weight[1::2], start[1::2]):
        raise CheckFailed("rows without gradient have changed")
    if not bool((weight[::2] - start[::2]).sum() < 0):
        raise CheckFailed("rows with a gradient of one have not gone down")
    other = torch.nn.Parameter(start.clone())
    optimizer = subject.make([other], **options)
    for _ in range(2):
        subject.evaluate(optimizer, lambda: closure(other, joined=True))
    subject.close([weight], [other], "a row listed twice against the sum of its gradients", start=[start], rtol=1e-4)
    subject.fact("sparse gradients", "used")


@check(
    why="A complex gradient that is squared in place of multiplied by its conjugate gives updates of any direction.",
    fix="Work on `torch.view_as_real(param)`, or refuse complex parameters in __init__.",
)
def complex_parameters(subject: Subject) -> None:
    """A complex parameter goes the way of its two parts, or is refused by an error that says so."""
    start = torch.view_as_complex(subject.parameters(((4, 3, 2),))[0].detach())
    found = torch.nn.Parameter(start.clone())
    grads = [[torch.view_as_complex(g)] for (g,) in subject.gradients([torch.view_as_real(start)], 8)]
    try:
        subject.run(params=[found], grads=grads, **subject.without_decay())
    except Exception as error:
        text = str(error).lower()
        if "complex" not in text:
            raise CheckFailed(f"the error does not say that complex numbers are the reason: {error!r:.200}") from error
        subject.fact("complex parameters", "refused")
        raise CheckSkipped("it refuses complex parameters") from None
    subject.finite([found.detach()], "after gradients of a complex parameter")
    inner: Any = sum(float(((found - start) * g[0].conj()).real.sum()) for g in grads)
    if not inner < 0:
        raise CheckFailed(f"a complex parameter has gone with its gradients: inner product {inner:.2g}")
    subject.fact("complex parameters", "used")
