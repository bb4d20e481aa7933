"""Calls of torch's loss functions, and what their arguments show."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CLASSIFICATION = ("cross_entropy", "nll_loss")
BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
REGRESSION = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


@dataclass
class LossCall:
    """One call of a loss function.

    Args:
        name: Name of the function.
        module: Name of the module that called it.
        shape: Shape of the predictions.
        target_shape: Shape of the targets.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        made_by: Name of the function that made the predictions, reshapes aside.
        target_from_batch: Whether the targets come from the batch.
        trained: Whether the predictions require a gradient.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    reduction: str
    made_by: str
    target_from_batch: bool
    trained: bool
    plain: bool = True
    """Whether there are no weights and there is no smoothing."""
    value: float = math.nan
    """Mean of its elements."""
    terms: int = 1
    """Number of its elements."""
    chance: float | None = None
    """What the best constant prediction gives; None if that is unknown."""
    classes: int | None = None
    used: set[int] = field(default_factory=set)
    """Classes of the targets."""
    targets: int = 0
    output_rms: float = 0.0
    output_spread: float = 0.0
    """Standard deviation of the predictions around their mean over the classes, or over all."""
    in_unit: bool = False
    """Whether all predictions are in [0, 1]."""
    sums_to_one: bool = False
    """Whether the predictions of each sample sum to 1."""
    log_sum: float = 0.0
    """Largest distance from 0 of the log of the sum of the exponentials of a sample's predictions."""
    target_mean: float = 0.0
    target_std: float = 0.0
    bad: bool = False
    """Whether predictions or targets are not finite."""
    target_sums: tuple[float, float] | None = None
    """Least and largest sum of a sample's class probabilities."""

    def result(self, value: Tensor) -> None:
        """Take the value of the call."""
        value = value.detach().float()
        self.value = float(value.mean()) if self.reduction != "sum" else float(value) / max(self.terms, 1)

    @property
    def scale_of_result(self) -> float:
        """What the function has returned, or the mean of it."""
        return self.value * self.terms if self.reduction == "sum" else self.value


def see_loss(
    func: Any, name: str, args: Any, kwargs: Any, where: str, origin: Callable[[Tensor], tuple[str, bool]]
) -> tuple[LossCall | None, tuple[str, str] | None]:
    """Look at the arguments of a loss function before it runs.

    Args:
        func: The function.
        name: Its name.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: Name of the module that calls it.
        origin: What made a tensor, and whether it comes from the batch alone.

    Returns:
        What was seen, and the kind and text of what torch is going to refuse; None for each if there is nothing.
    """
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
    except (TypeError, ValueError):
        return None, None
    outputs, targets = given.get("input"), given.get("target")
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not outputs.numel():
        return None, None
    made_by, _ = origin(outputs)
    call = LossCall(
        name,
        where,
        tuple(outputs.shape),
        tuple(targets.shape),
        given.get("reduction", "mean"),
        made_by,
        origin(targets)[1],
        outputs.requires_grad,
        plain=given.get("weight") is None and not given.get("label_smoothing") and given.get("pos_weight") is None,
    )
    values = outputs.detach().float()
    call.bad = not bool(torch.isfinite(values).all()) or not bool(torch.isfinite(targets.float()).all())
    if call.bad and name not in CLASSIFICATION:
        return call, None
    call.output_rms = float(values.square().mean().sqrt())
    call.in_unit = bool((values >= 0).all() and (values <= 1).all())
    if name in CLASSIFICATION:
        return call, _classification(call, values, targets.detach(), given.get("ignore_index", -100))
    call.terms = int(outputs.numel())
    wanted = targets.detach().float()
    call.targets, call.target_mean = wanted.numel(), float(wanted.mean())
    call.target_std = float(wanted.std(unbiased=False))
    call.output_spread = float(values.std(unbiased=False))
    if name in BINARY:
        return call, _binary(call, values, wanted)
    if name == "mse_loss":
        call.chance = call.target_std**2
    elif name == "l1_loss":
        call.chance = float((wanted - wanted.median()).abs().mean())
    return call, None


def _classification(call: LossCall, values: Tensor, targets: Tensor, ignored: int) -> tuple[str, str] | None:
    axis = 1 if values.ndim > 1 else 0
    classes = call.classes = values.shape[axis]
    samples = values.movedim(axis, -1).reshape(-1, classes)
    call.output_spread = float(samples.std(1, unbiased=False).square().mean().sqrt()) if classes > 1 else 0.0
    sums = samples.sum(1)
    call.sums_to_one = call.in_unit and classes > 1 and bool(((sums - 1).abs() < 1e-2).all())
    call.log_sum = float(samples.logsumexp(1).abs().max())
    call.chance = math.log(classes)
    shapes = f"predictions {list(call.shape)}, targets {list(call.target_shape)}"
    if targets.is_floating_point():
        if targets.shape != values.shape:
            return "target-dtype", f"{shapes} of {targets.dtype}, which are neither class indices nor probabilities"
        rows = targets.movedim(axis, -1).reshape(-1, classes).float().sum(1)
        call.target_sums = (float(rows.min()), float(rows.max()))
        call.terms = call.targets = len(samples)
        call.chance = None
        return None
    if targets.ndim == values.ndim and targets.shape == values.shape and values.ndim > 1:
        return "one-hot-targets", f"{shapes} of {targets.dtype}: one-hot vectors of whole numbers"
    wanted = values.shape[:axis] + values.shape[axis + 1 :]
    if tuple(wanted) != call.target_shape:
        return "shape-mismatch", f"{shapes}; for these predictions targets are {list(wanted)}"
    kept = targets[targets != ignored]
    call.terms = call.targets = int(kept.numel())
    if not kept.numel():
        return None
    low, high = int(kept.min()), int(kept.max())
    call.used = set(torch.unique(kept).tolist()[:100_000])
    if low < 0 or high >= classes:
        return "target-range", f"targets from {low} to {high} for {classes} classes, 0 to {classes - 1}"
    return None


def _binary(call: LossCall, values: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    call.chance = math.log(2)
    if call.name == "binary_cross_entropy" and not call.in_unit:
        return (
            "logits-to-bce",
            f"predictions from {float(values.min()):.3g} to {float(values.max()):.3g}, not in [0, 1]",
        )
    if call.shape != call.target_shape:
        return "shape-mismatch", f"predictions {list(call.shape)}, targets {list(call.target_shape)}"
    low, high = float(wanted.min()), float(wanted.max())
    if low < 0 or high > 1:
        text = f"targets from {low:.3g} to {high:.3g}, not in [0, 1]"
        if call.name == "binary_cross_entropy":
            return "target-range", text
        call.target_sums = (low, high)
    call.used = {round(low), round(high)} if low == high else {0, 1}
    return None
