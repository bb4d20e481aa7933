"""One update of all parameters: each batch by its backend, with the values that batches share and step statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.core.host import is_set, widest_dtype
from lightning_optim.core.stats import STEP_SUMS, StepStats
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.optim import admission
from lightning_optim.optim.admission import Ruled
from lightning_optim.optim.batches import Batches

_AS_IT_IS = nullcontext()


class Updated(Ruled, Protocol):
    """What an optimizer has that updates its parameters; a GradScaler may add ``grad_scale`` and ``found_inf``."""

    divisor: Tensor | None
    collect_step_stats: bool


def update(optimizer: Updated, batches: Batches) -> StepStats | None:
    """Update all parameters of ``batches`` once, in place, unless `found_inf` of the optimizer is non-zero.

    Args:
        optimizer: The optimizer.
        batches: Its batches, with gradients.

    Returns:
        Statistics of the step if `collect_step_stats` of the optimizer is set, otherwise None.

    Raises:
        ValueError: The optimizer's `divisor` has another shape than [] or [tensors].
    """
    count = len(batches.numel)
    if optimizer.divisor is not None and optimizer.divisor.shape not in ((), (count,)):
        raise ValueError(
            f"{type(optimizer).__name__}: divisor has shape {tuple(optimizer.divisor.shape)}, but must be [] or one "
            f"value for each parameter with a gradient, [{count}]."
        )
    new_shared = _share(optimizer, batches)
    everything = list(zip(batches.batches, batches.backends, batches.rows, strict=True))
    collected: list[Tensor | None] = [None] * len(everything)
    flag = getattr(optimizer, "found_inf", None)
    if flag is not None:
        for route in batches.routes:  # Ranks that share work skip together.
            flag = route.agree(flag)
    completions: list[tuple[int, Tensor | None, Callable[[], Tensor | None]]] = []
    for number in batches.order:
        batch, backend, rows = everything[number]
        skip = _on(flag, batch.device)
        if skip is not None and batch.device.type == "cpu" and not backend.reads_skip:  # else the device knows
            if is_set(skip):
                if optimizer.collect_step_stats:
                    collected[number] = torch.full((len(rows), len(STEP_SUMS)), math.nan, device="cpu")
                continue
            skip = None
        how: Any = {
            "divisor": _divisor(optimizer, rows, batch.device),
            "skip": skip,
            "collect": optimizer.collect_step_stats,
        }
        if batch.route is not None:
            completions.append((number, skip, backend.begin(batch, **how)))
            continue
        with _AS_IT_IS if batch.plain else admission.by_name(optimizer, batch.full_params):
            collected[number] = backend.apply(batch, **how)
        if not _is_skipped(skip):
            torch.autograd.graph.increment_version(batch.written)
    for number, skip, complete in completions:
        collected[number] = complete()
        if not _is_skipped(skip):
            torch.autograd.graph.increment_version(everything[number][0].written)
    for old, new in new_shared:
        old.copy_(new)
    return _stats(batches, [sums for sums in collected if sums is not None]) if optimizer.collect_step_stats else None


def _is_skipped(skip: Tensor | None) -> bool:
    """Return whether the host knows that the step is skipped."""
    # Triton's interpreter reads the flag itself, on the CPU; on other devices the host does not know it.
    return skip is not None and skip.device.type == "cpu" and is_set(skip)


def init_shared(optimizer: Ruled, group: dict[str, Any], rule: UpdateRule) -> None:
    """Add missing values of `shared` to ``group``: those of another group with the rule, or initial values."""
    device = group["params"][0].device
    first = group.get(rule.shared[0])  # A plain number is a hyperparameter of another optimizer.
    if isinstance(first, Tensor) and first.device == device:
        return
    given = [g for g in optimizer.param_groups if _has_shared(g, rule) and type(optimizer.rule_of(g)) is type(rule)]
    values = given[0] if given else rule.init_shared(group)
    for name in rule.shared:
        value = values[name]
        if not isinstance(value, Tensor):
            value = upload(value, device, widest_dtype(device))
        group[name] = value.to(device, widest_dtype(device), copy=True, non_blocking=True)


def _share(optimizer: Updated, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """Compute the new values of `shared` for the batches; return pairs (old, new) to be written after all updates."""
    pairs = []
    everything = list(zip(batches.batches, batches.backends, batches.rows, strict=True))
    rules = {type(batch.rule): batch.rule for batch in batches.batches}
    for kind, rule in rules.items():
        if not (isinstance(rule, UpdateRule) and rule.shared):
            continue
        members = [member for member in everything if type(member[0].rule) is kind]
        groups = [g for g in optimizer.param_groups if _has_shared(g, rule) and type(optimizer.rule_of(g)) is kind]
        device = members[0][0].device
        skip = _on(getattr(optimizer, "found_inf", None), device)
        totals: dict[str, Tensor] = {}
        for batch, backend, rows in members:
            with _AS_IT_IS if batch.plain else admission.by_name(optimizer, batch.full_params):
                sums = backend.sums(batch, _divisor(optimizer, rows, batch.device))
            for name, column in sums.items():
                total = column.sum().to(device, non_blocking=True)
                totals[name] = totals[name] + total if name in totals else total
        new = rule.share(groups[0], totals)
        for batch, _, _ in members:
            for name, value in new.items():
                batch.shared[name] = value.to(batch.device, non_blocking=True)
        for group in groups:
            for name, value in new.items():
                old = group[name]
                value = value.to(old.device, non_blocking=True)
                if skip is not None:
                    value = torch.where(skip.to(old.device) != 0, old, value)
                pairs.append((old, value))
    return pairs


def _divisor(optimizer: Updated, rows: list[int], device: torch.device) -> Tensor | None:
    """Return the divisor of the gradients at indices ``rows``, shape [] or [rows], on ``device``; None for 1."""
    scale = _on(getattr(optimizer, "grad_scale", None), device)
    divisor = _on(optimizer.divisor, device)
    if divisor is not None and divisor.dim() == 1 and len(rows) != divisor.numel():
        divisor = divisor[upload(rows, device)]
    if scale is None or divisor is None:
        return divisor if scale is None else scale.reshape(())
    return divisor * scale.reshape(())


def _stats(batches: Batches, collected: list[Tensor]) -> StepStats:
    if len(collected) == 1:
        (sums,) = collected
    else:
        device = collected[0].device if collected else torch.device("cpu")
        sums = torch.empty(len(batches.numel), len(STEP_SUMS), device=device)
        for rows, part in zip(batches.rows, collected, strict=True):
            sums[upload(rows, device)] = part.to(device, non_blocking=True)
    return StepStats(sums, batches.group_sizes, batches.numel)


def _has_shared(group: Mapping[str, Any], rule: UpdateRule) -> bool:
    return isinstance(group.get(rule.shared[0]), Tensor)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)
