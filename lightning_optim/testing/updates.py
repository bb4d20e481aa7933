"""Checks of how parameters are written, and of what a run leaves behind."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import change, tensors_in
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject


@check(
    why="The model holds the Parameter objects; a new tensor in their place is never seen by it.",
    fix="Write into the parameter (`param.add_(...)` under `torch.no_grad()`); do not assign `param.data`.",
)
def updated_in_place(subject: Subject) -> None:
    """A step writes into the memory of the parameters, which stay leaves that require gradients."""
    params = subject.parameters()
    places = [p.data_ptr() for p in params]
    subject.run(params=params)
    for index, (param, place) in enumerate(zip(params, places, strict=True)):
        if param.data_ptr() != place:
            raise CheckFailed(f"parameter {index} has other memory than before")
        if not (param.is_leaf and param.requires_grad):
            raise CheckFailed(f"parameter {index} is no leaf that requires gradients any more")


@check(
    why="Autograd refuses a backward pass through weights that have changed only if it can notice the change.",
    fix="Write with torch's in-place operations on the parameter under `torch.no_grad()`, not through `param.data`.",
)
def version_counter(subject: Subject) -> None:
    """Autograd notices the update: the version of each parameter increases."""
    params = subject.parameters()
    versions = [p._version for p in params]
    subject.run(params=params, steps=1)
    unnoticed = [i for i, (p, v) in enumerate(zip(params, versions, strict=True)) if p._version == v]
    if unnoticed:
        raise CheckFailed(f"the version of parameter {unnoticed[0]} is what it was before the step")


@check(
    why="State that is part of a graph keeps every step since the start in memory.",
    fix="Decorate `step` with `@torch.no_grad()`, and detach what the state keeps.",
)
def no_graph(subject: Subject) -> None:
    """Neither parameters nor state are part of a graph, even if gradients are (`create_graph=True`)."""
    params = subject.parameters()
    optimizer = subject.make(params)
    weight = torch.ones((), requires_grad=True, device="cpu")
    for grads in subject.gradients(params, 2):

        def closure(grads: list[Tensor] = grads) -> Tensor:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * weight.to(grad.device)  # as after backward(create_graph=True)
            return torch.zeros((), device="cpu")

        subject.evaluate(optimizer, closure)
    for name, tensor in tensors_in({"params": params, "state": list(optimizer.state.values())}):
        if tensor.grad_fn is not None:
            raise CheckFailed(f"{name} has a graph ({type(tensor.grad_fn).__name__})")
        if name.startswith("['state']") and tensor.requires_grad and not any(tensor is p for p in params):
            raise CheckFailed(f"{name} requires gradients")


@check(
    why="A list that grows by a tensor per step, or a tensor by an element, ends a long run.",
    fix="Overwrite state in place, or keep a window of fixed length.",
)
def memory_flat(subject: Subject) -> None:
    """The number of live tensors stays the same from step 30 to step 200, and the size of state from step 130 on."""
    params = subject.parameters()
    optimizer = subject.make(params)
    grads = subject.gradients(params, 5)
    counts: list[int] = []
    sizes: list[int] = []
    for step in range(200):
        subject.step(optimizer, params, grads[step % 5])
        if step in (29, 199):
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        if step in (129, 199):  # A window may fill until then.
            held = tensors_in([list(optimizer.state.values()), optimizer.param_groups, vars(optimizer)])
            sizes.append(sum({id(t): t.numel() for _, t in held}.values()))
    if counts[1] > counts[0] + 20:
        raise CheckFailed(f"{counts[1] - counts[0]} more tensors after 170 steps")
    if sizes[1] > sizes[0] + 20:
        raise CheckFailed(f"{sizes[1] - sizes[0]} more elements in the optimizer's tensors after 70 steps")


@check(
    why="Two runs from one seed must agree, or no bug can be found by comparing runs.",
    fix="Draw random numbers from torch's generator, and do not iterate over sets of tensors.",
)
def deterministic(subject: Subject) -> None:
    """Two runs from the same seed end bit-equal."""
    torch.manual_seed(0)
    _, wanted = subject.run(10)
    torch.manual_seed(0)
    _, found = subject.run(10)
    subject.same(found, wanted, "a second run from the same seed")


@check(
    why="A GAN has two optimizers of a class; state in the class, or in a mutable default, mixes them.",
    fix="Make state in `self.state[param]` or in the instance, never in the class or a default argument.",
)
def independent_instances(subject: Subject) -> None:
    """Two optimizers of one kind do not influence each other."""
    torch.manual_seed(0)
    _, wanted = subject.run(5)
    torch.manual_seed(0)
    params, others = subject.parameters(), subject.parameters(seed=5)
    optimizer, other = subject.make(params), subject.make(others)
    for grads, more in zip(subject.gradients(params, 5), subject.gradients(others, 5, seed=50), strict=True):
        state = torch.random.get_rng_state()
        subject.step(other, others, more)
        torch.random.set_rng_state(state)
        subject.step(optimizer, params, grads)
    subject.same(params, wanted, "with another instance stepping in between")


@check(
    why="A formula is wrong in the fourth digit for years: eps inside the root, a missing bias correction.",
    fix="Follow the reference line by line, in double precision, until the first step agrees.",
)
def reference_formula(subject: Subject) -> None:
    """In float64 the run agrees with the given reference to ten digits."""
    if subject.reference is None:
        raise CheckSkipped("no reference is given")
    params = subject.parameters(dtype=torch.float64)
    grads = subject.gradients(params, 6)
    optimizer, _ = subject.run(params=params, grads=grads)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    values = [p.detach().clone() for p in subject.parameters(dtype=torch.float64)]
    states: list[dict[str, object]] = [{} for _ in values]
    for step, each in enumerate(grads, 1):
        values = [
            subject.reference(value, grad, state, step, **options)
            for value, grad, state in zip(values, each, states, strict=True)
        ]
    start = subject.parameters(dtype=torch.float64)
    if (text := change(params, values, start=start, rtol=1e-10)) is not None:
        raise CheckFailed(f"after six steps {text}")


@check(
    why="foreach is the default on a GPU, so that a difference shows only there.",
    fix="Write both loops from one formula, and test them against each other.",
)
def foreach(subject: Subject) -> None:
    """`foreach=True` and `foreach=False` give the same weights up to rounding."""
    if not subject.has("foreach"):
        raise CheckSkipped("it has no option 'foreach'")
    torch.manual_seed(0)
    _, wanted = subject.run(5, foreach=False)
    torch.manual_seed(0)
    _, found = subject.run(5, foreach=True)
    subject.close(found, wanted, "foreach=True against foreach=False", rtol=1e-4)
