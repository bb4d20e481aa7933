"""Checks beside torch's own machinery: GradScaler, schedulers, hooks, compilation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import difference, snapshot
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject, draw_by, needs_closure


@check(
    why="float16 training scales the loss; a step with an overflow must not happen at all.",
    fix="Update in `step` only. With `_step_supports_amp_scaling`, divide by `grad_scale` and obey `found_inf`.",
)
def grad_scaler(subject: Subject) -> None:
    """Under a GradScaler scaled gradients do what plain ones do, and an overflow changes nothing."""
    _, wanted = subject.run(4)
    params = subject.parameters()
    optimizer = subject.make(params)
    if needs_closure(optimizer):
        raise CheckSkipped("its step needs a closure, which GradScaler does not take")
    scaler = torch.amp.GradScaler(subject.device.type, init_scale=1024.0, growth_interval=1000)
    for number, grads in enumerate(subject.gradients(params, 4)):
        scaler.scale(torch.ones((), device=subject.device))
        scale = scaler.get_scale()
        if number == 2:
            before, state = snapshot(list(params)), snapshot(optimizer.state_dict())
            for param, grad in zip(params, grads, strict=True):
                param.grad = torch.full_like(grad, float("inf"))
            scaler.step(optimizer)
            scaler.update()
            subject.same(params, before, "an overflow has changed a weight")
            if (found := difference(state, optimizer.state_dict(), "state_dict()")) is not None:
                raise CheckFailed(f"after an overflow {found}")
            scale = scaler.get_scale()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * scale
        draw_by(grads)
        scaler.step(optimizer)
        scaler.update()
    subject.close(params, wanted, "scaled gradients against plain ones", rtol=1e-4)


@check(
    why="Warmup, cosine and plateau write `group['lr']`, and OneCycleLR betas or momentum as well.",
    fix="Read lr from the group at each step, and give the groups the usual names.",
)
def lr_schedulers(subject: Subject) -> None:
    """Under torch's schedulers the run is that with the same rates written by hand."""
    lr = subject.value("lr")
    if not isinstance(lr, float | int):
        raise CheckSkipped(f"its lr is {lr!r}")
    from torch.optim import lr_scheduler as schedulers

    made: dict[str, Any] = {
        "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
        "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
        "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=4),
        "OneCycleLR": lambda o: schedulers.OneCycleLR(o, lr, total_steps=8, cycle_momentum=False),
        "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    }
    for name, make in made.items():
        params = subject.parameters()
        optimizer = subject.make(params)
        scheduler = make(optimizer)
        by_hand = subject.parameters()
        other = subject.make(by_hand)
        for grads in subject.gradients(params, 5):
            for group, like in zip(other.param_groups, optimizer.param_groups, strict=True):
                for key, value in like.items():
                    if key in ("lr", "initial_lr", "max_lr", "min_lr"):
                        group[key] = value
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            subject.step(optimizer, params, grads)
            subject.step(other, by_hand, grads)
            if [float(group["lr"]) for group in optimizer.param_groups] != rates:
                raise CheckFailed(f"a step has changed group['lr'], from {rates[0]:.3g}")
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        subject.finite(params, name)
        subject.close(params, by_hand, f"{name} against the same rates by hand", rtol=1e-5)


@check(
    why="Clipping, monitors and averaging hang on step hooks; an override that bypasses them is never seen.",
    fix="Call `super().__init__`, and define `step` in the class: torch wraps it there.",
)
def step_hooks(subject: Subject) -> None:
    """Hooks before and after the step are called once for each step, also on one class after another."""
    params = subject.parameters()
    optimizer = subject.make(params)
    calls: list[str] = []
    for name in ("register_step_pre_hook", "register_step_post_hook"):
        if not hasattr(optimizer, name):
            raise CheckFailed(f"it has no {name}: it is no torch.optim.Optimizer")
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    subject.run(2, params=params, optimizer=optimizer)
    if calls != ["before", "after"] * 2:
        raise CheckFailed(f"calls in two steps: {', '.join(calls) or 'none'}")


@check(
    why="Trainers recognise optimizers by their class, and print them.",
    fix="Inherit from torch.optim.Optimizer.",
)
def torch_optimizer(subject: Subject) -> None:
    """It is a torch.optim.Optimizer, `repr` shows its values, and `profile_hook_step` wraps `step`."""
    optimizer, _ = subject.run(1)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise CheckFailed(f"{type(optimizer).__name__} does not inherit from torch.optim.Optimizer")
    if "lr" in optimizer.param_groups[0] and "lr" not in repr(optimizer):
        raise CheckFailed(f"repr shows no lr: {repr(optimizer)[:80]!r}")
    if not hasattr(type(optimizer).step, "hooked"):
        raise CheckFailed("step is not wrapped: super().__init__ was not called")


@check(
    why="A compiled step is the way to a fused kernel for an optimizer in plain torch.",
    fix="No `.item()`, no dependence on tensor values in Python, and the step count as a tensor.",
    group="compile",
)
def compiled_step(subject: Subject) -> None:
    """`torch.compile` of the step (traced, run by eager) gives the weights of the plain step."""
    _, wanted = subject.run(4)
    params = subject.parameters()
    optimizer = subject.make(params)
    if needs_closure(optimizer):
        raise CheckSkipped("its step needs a closure")
    dynamo: Any = torch._dynamo
    compiled: Any = torch.compile
    dynamo.reset()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Graph breaks would be told in twenty lines each, in the middle of a report.
    try:
        step = compiled(optimizer.step, backend="eager")
        for grads in subject.gradients(params, 4):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            draw_by(grads)
            step()
    finally:
        logging.disable(level)
        dynamo.reset()
    subject.close(params, wanted, "the compiled step against the plain one", rtol=1e-4)


@check(
    why="What waits for the device at each step lets a GPU run dry.",
    fix="Keep counts and decisions in tensors; no `.item()`, `float(tensor)` or `if tensor` in step.",
    group="gpu",
)
def gpu_cost(subject: Subject) -> None:
    """On a GPU the step does not wait for the device; time and peak memory are noted."""
    if subject.device.type != "cuda":
        raise CheckSkipped("it needs a GPU: device='cuda'")
    params = subject.parameters([(1024, 1024)] * 8)
    optimizer, _ = subject.run(3, params=params)
    weights = sum(p.numel() for p in params)
    for param in params:
        param.grad = torch.randn_like(param)

    def closure() -> Tensor:
        return torch.zeros((), device=subject.device)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    event: Any = torch.cuda.Event  # without types
    before, after = event(enable_timing=True), event(enable_timing=True)
    before.record()
    for _ in range(10):
        optimizer.step(closure)
    after.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    time = before.elapsed_time(after) / 10
    subject.fact("time on a GPU", f"{time * 1e6 / weights:.3g} ns per weight")
    subject.fact("peak memory of a step", f"{peak / weights:.3g} bytes per weight")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(closure)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CheckFailed("a step waits for the device") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")
