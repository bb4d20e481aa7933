"""What the plan of a run says besides groups and schedules: batch, clipping, guard, snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_optim.callbacks._lightning import data_parallel_size
from lightning_optim.callbacks.divergence_guard import DivergenceGuard
from lightning_optim.callbacks.gradient_clipping import GradientClipping
from lightning_optim.callbacks.gradient_release import GradientRelease
from lightning_optim.callbacks.weight_average import WeightAverage
from lightning_optim.core.sizes import format_bytes
from lightning_optim.factory.plan import GroupPlan
from lightning_optim.kernels.averages import kept_by

PLACES = {"device": "on the device", "disk": "on disk"}
"""Where snapshots are, by `Rollback.memory`; otherwise in the memory of the host."""


def batch_fact(trainer: L.Trainer, loaders: Iterable[Any]) -> str:
    """Return how many samples an optimizer step has.

    Args:
        trainer: The Trainer, which knows accumulation and devices.
        loaders: The loaders of training.
    """
    sizes = [_batch_size(loader) for loader in loaders]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = [c.scheduling for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    accumulated, ranks = trainer.accumulate_grad_batches, data_parallel_size(trainer)
    size = sizes[0] if len(sizes) == 1 else None
    text = " + ".join("unknown" if one is None else f"{one:,}" for one in sizes) or "unknown"
    parts = [f"{text} samples"]
    if len(scheduled) == 1 and len(scheduled[0]) > 1:
        changes = ", ".join(f"{factor} from epoch {epoch}" for epoch, factor in sorted(scheduled[0].items()))
        return f"{parts[0]}, accumulated over {changes}" + (f", on {ranks} ranks" if ranks > 1 else "")
    if accumulated > 1:
        parts.append(f"{accumulated} accumulated")
    if ranks > 1:
        parts.append(f"{ranks} ranks")
    total = "" if size is None or len(parts) == 1 else f" = {size * accumulated * ranks:,} per step"
    return " x ".join(parts) + total


def _batch_size(loader: Any) -> int | None:
    for where in (loader, getattr(loader, "batch_sampler", None)):
        if isinstance(size := getattr(where, "batch_size", None), int):
            return size
    return None


def clipping_fact(trainer: L.Trainer) -> str:
    """Return what clips the gradients.

    Args:
        trainer: The Trainer, with its callbacks.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [repr(callback) for callback in callbacks if isinstance(callback, GradientClipping)]
    if trainer.gradient_clip_val:
        ours.append(f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r})")
    return "; ".join(ours) or "none"


def release_facts(trainer: L.Trainer) -> dict[str, str]:
    """Return what becomes of gradients; empty if they are kept until the step.

    Args:
        trainer: The Trainer, with its callbacks.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    released = any(isinstance(callback, GradientRelease) for callback in callbacks)
    return {"Gradients": "used and dropped in the backward pass, one tensor at a time"} if released else {}


def guard_facts(trainer: L.Trainer, groups: Sequence[GroupPlan]) -> dict[str, str]:
    """Return what guards the run, and the memory of its snapshots.

    Args:
        trainer: The Trainer, with its callbacks and its module.
        groups: The groups of all optimizers, with the size of their state.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    guard = next((callback for callback in callbacks if isinstance(callback, DivergenceGuard)), None)
    if guard is None:
        return {"Guard": "none"}
    skips = "values that are not finite"
    if guard.spikes is not None:
        skips += f", spikes above {guard.spikes.threshold:g}"
    rungs = []
    if guard.lr_cut is not None:
        rungs.append(f"lr x {guard.lr_cut.factor:g}")
    if guard.rollback is not None:
        rungs.append(f"rollback (a snapshot every {guard.rollback.every} steps)")
    rungs += ["stop"] * guard.stops
    facts = {"Guard": f"skips {skips}; then {', '.join(rungs) or 'nothing'}"}
    if guard.rollback is not None:
        facts["Snapshots"] = _snapshots(trainer, groups, guard.rollback.memory)
    return facts


def _snapshots(trainer: L.Trainer, groups: Sequence[GroupPlan], memory: str) -> str:
    states = [group.state_bytes for group in groups]
    size = sum(state for state in states if state is not None)
    module = trainer.lightning_module
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()
    lazy = any(isinstance(tensor, UninitializedParameter) for tensor in tensors)
    size += sum(tensor.numel() * tensor.element_size() for tensor in tensors if not _is_lazy(tensor))
    at_least = "at least " if None in states or lazy else ""
    return f"2 of {at_least}{format_bytes(size)}, {PLACES.get(memory, 'in the memory of the host')}"


def _is_lazy(tensor: Any) -> bool:
    return isinstance(tensor, UninitializedParameter)


def average_facts(trainer: L.Trainer, optimizers: Sequence[Optimizer]) -> tuple[dict[str, str], list[str]]:
    """Return the averages of weights that are kept, and what is missing for their use.

    Args:
        trainer: The Trainer, with its callbacks.
        optimizers: The optimizers themselves, no wrappers.

    Returns:
        Facts by label, and notes.

    Raises:
        MisconfigurationException: The callback uses an average that no optimizer keeps.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    users = [callback for callback in callbacks if isinstance(callback, WeightAverage)]
    for user in users:
        user.check(trainer)
    kept: list[tuple[float | str, ...]] = [
        kept_by(group) for optimizer in optimizers for group in optimizer.param_groups if group.get("ema")
    ]
    if not kept:
        return {}, []
    used = {user.which for user in users}
    purpose = " (for validation and checkpoints)"
    most = sorted(kept, key=len)[-1]
    texts = [f"{entry}{purpose if k in used else ''}" for k, entry in enumerate(most)]
    note = (
        "Averages of the weights are kept. Without the callback lightning_optim.WeightAverage, validation and "
        "checkpoints have the weights of the last step. Add it, or take lightning_optim.optim.ema_state_dict."
    )
    return {"Averages": "; ".join(texts)}, [] if users else [note]
