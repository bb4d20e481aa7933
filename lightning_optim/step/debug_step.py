"""One step of any optimizer under observation: what it did to each tensor, what it left alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.step.debug_findings import findings_of
from lightning_optim.step.debug_reasons import RunFacts, why_unchanged
from lightning_optim.step.debug_report import DebugReport
from lightning_optim.step.debug_rows import Before, TensorStep
from lightning_optim.step.undo import OptimizerSnapshot


def debug_step(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None = None,
    *,
    model: nn.Module | None = None,
    others: Sequence[Optimizer] = (),
    undo: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> DebugReport:
    """Run one step and report what it did to each tensor, what it left alone, and why.

    It stands in the place of ``optimizer.step()``, after ``backward()``, for any optimizer of torch's kind. It changes
    what the step changes and nothing else; with ``undo`` it changes nothing. It copies all tensors and waits for the
    device, so it is for one step, not for training.

    The part of weight decay is measured by the same step without it, from the same weights, gradients, state and random
    numbers, which is undone. It is not measured where step hooks are registered, which might act on both steps, unless
    the step is undone, nor where the closure is evaluated more than once.

    Args:
        optimizer: The optimizer, or Lightning's wrapper around one.
        closure: Function that computes the gradients and returns the loss, for `step`.
        model: The model, for the names of parameters, and to find parameters that no optimizer has, or that are not
            those of the model.
        others: Further optimizers of the same model, whose parameters are not missing and must not be the same.
        undo: Whether to put everything back: parameters, gradients, state, groups, random numbers, and the buffers of
            ``model``. Step hooks, which may count steps, then do not run, so clipping by a hook is not included.
        scaler: The scaler that has scaled the loss. The gradients are divided by its scale first, and it does the step,
            so that the report has true gradients and a step with an overflow is skipped; `update` remains yours.

    Returns:
        The report; ``print`` shows it in 80 columns.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: ``scaler`` is given with ``undo`` or a closure.
        Exception: The step raises; with ``undo`` everything has been put back then.

    Example:
        >>> import lightning_optim as lo
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD([model.weight], lr=0.01)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> report = lo.debug_step(optimizer, model=model)
        >>> report.ok, report.kinds
        (False, ['in-no-optimizer'])
        >>> [(row.name, row.grad, round(row.update_norm, 3)) for row in report.rows]
        [('weight', 'fine', 0.02)]
    """
    inner = _inner(optimizer)
    if scaler is not None:
        _unscale(scaler, inner, closure is not None, undo)
    befores = _befores(inner, model)
    snapshot = OptimizerSnapshot(inner)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if model is not None and undo else []
    hooked = _has_hooks(inner)
    if undo:
        _clear_hooks(inner)
    calls: list[Any] = []

    def counted() -> Any:
        loss = closure() if closure is not None else None
        calls.append(loss)
        if len(calls) == 1:  # LBFGS and SAM evaluate it again, at other weights
            _take_gradients(befores)
        return loss

    _take_gradients(befores)
    try:
        stepped = inner if undo else optimizer  # Lightning's wrapper counts its steps
        if scaler is not None:
            scaler.step(inner)
        else:
            stepped.step() if closure is None else stepped.step(counted)
        rows, facts = _observe(inner, befores, RunFacts(closure is not None, len(calls)))
        if (not hooked or undo) and len(calls) < 2 and any(_decays(group) for group in inner.param_groups):
            rows = _with_decay(inner, befores, rows, snapshot, calls)
    finally:
        if undo:
            snapshot.restore()
            for buffer, content in buffers:
                buffer.copy_(content)
    return DebugReport(tuple(rows), tuple(findings_of(rows, facts, inner, model, others)), type(inner).__name__, undo)


def _unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer, has_closure: bool, undo: bool) -> None:
    """Divide the gradients by the scale, unless that has been done."""
    if has_closure:
        raise ValueError("Invalid scaler: a GradScaler takes no closure. Call backward() first, and give no closure.")
    if undo:
        raise ValueError(
            "Invalid scaler with undo=True: what a scaler has noted cannot be put back. "
            "Call scaler.unscale_(optimizer) yourself, and give no scaler."
        )
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _inner(optimizer: Any) -> Optimizer:
    """Return the optimizer itself, which Lightning wraps."""
    wrapped = any(base.__name__ == "LightningOptimizer" for base in type(optimizer).__mro__)  # itself an Optimizer
    inner = optimizer.optimizer if wrapped else optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"Invalid optimizer={optimizer!r}: must be a torch.optim.Optimizer.")
    return inner


def _befores(optimizer: Optimizer, model: nn.Module | None) -> list[Before]:
    known = {id(param): name for name, param in model.named_parameters()} if model is not None else {}
    found = []
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for place, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            label = known.get(id(param)) or name or f"{group.get('name', f'group {index}')}[{place}]"
            state = optimizer.state.get(param, {})
            found.append(Before(label, param, group, index, state))
    return found


def _take_gradients(befores: Sequence[Before]) -> None:
    for before in befores:
        before.take_gradient()


def _observe(optimizer: Optimizer, befores: Sequence[Before], facts: RunFacts) -> tuple[list[TensorStep], RunFacts]:
    changes = [before.change() for before in befores]
    found_inf = getattr(optimizer, "found_inf", None)
    facts.found_inf = isinstance(found_inf, Tensor) and bool(found_inf.any())
    facts.nothing_changed = not any(bool(change.any()) for change in changes)
    facts.any_not_finite = any(before.grad_kind == "not finite" for before in befores)
    facts.wrote_gradients = [before.name for before in befores if facts.calls < 2 and before.grad_changed]
    facts.moved_storages = [before.name for before in befores if before.moved_storage]
    facts.not_finite_after = [
        before.name for before in befores if not bool(torch.isfinite(before.weight + 0 * before.change()).all())
    ]
    rows = []
    for before, change in zip(befores, changes, strict=True):
        state = optimizer.state.get(before.param, {})
        reason = None if bool(change.any()) else why_unchanged(before, before.state_changed(state), facts)
        rows.append(before.row(change, state, None, reason))
    return rows, facts


def _decays(group: Any) -> bool:
    value = group.get("weight_decay")
    return isinstance(value, Tensor | float | int) and bool(value)


def _with_decay(
    optimizer: Optimizer,
    befores: Sequence[Before],
    rows: list[TensorStep],
    snapshot: OptimizerSnapshot,
    calls: list[Any],
) -> list[TensorStep]:
    """Return the rows with the share of weight decay, after the same step without it, which is undone."""
    changes = [before.change() for before in befores]
    states = [dict(optimizer.state.get(before.param, {})) for before in befores]
    states = [{key: value.clone() if isinstance(value, Tensor) else value for key, value in s.items()} for s in states]
    after = OptimizerSnapshot(optimizer)
    try:
        snapshot.restore()
        for group in optimizer.param_groups:
            if _decays(group):
                # Not quite 0: LAMB and others adapt the rate only of groups that decay. Under `norm` it is a norm.
                none = 0.0 if group.get("weight_decay_kind") == "norm" else 1e-12
                group["weight_decay"] = group["weight_decay"] * none
        for before in befores:
            before.param.grad = None if before.grad is None else before.grad.clone()
        _clear_hooks(optimizer)
        with torch.no_grad():
            optimizer.step() if not calls else optimizer.step(lambda: calls[-1])
        decays = [change - before.change() for change, before in zip(changes, befores, strict=True)]
    finally:
        after.restore()
    return [
        before.row(change, state, decay, row.skipped)
        for before, change, state, decay, row in zip(befores, changes, states, decays, rows, strict=True)
    ]


# torch keeps the hooks of an optimizer in two dicts, without a way to leave them out of one step.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def _has_hooks(optimizer: Optimizer) -> bool:
    return any(getattr(optimizer, name, None) for name in _HOOKS)


def _clear_hooks(optimizer: Optimizer) -> None:
    """Remove the hooks; `OptimizerSnapshot.restore` brings them back."""
    for name in _HOOKS:
        getattr(optimizer, name, {}).clear()
