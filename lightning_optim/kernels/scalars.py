"""The numbers of one step, per tensor, from groups and 0-d state; on the host if it may read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.host import is_set, read, widest_dtype
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.rounding import advance, key_columns
from lightning_optim.kernels.rules import Scalar
from lightning_optim.kernels.weight_decay import group_decay


def scalar_columns(batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
    """Every number the update of a tensor needs, by name, each [tensors], float64, on the batch's device.

    What `rule.scalars` returns, `new_<name>` for what the rule shares, and `inverse_divisor` (negative for `maximize`),
    `decay`, `l2`, `eps` and `bias_correction2_sqrt`, which the backends and the step sums use; `largest`, for rules.
    """
    columns = _host_columns(batch) if batch.device.type == "cpu" else _device_columns(batch)
    if batch.rounding_keys:
        columns |= key_columns(batch.rounding_keys)
    for name, value in batch.shared.items():
        columns[f"new_{name}"] = value.expand(len(batch.params))
    if divisor is not None:
        columns["inverse_divisor"] = columns["inverse_divisor"] / divisor.to(columns["inverse_divisor"].dtype)
    return columns


def commit(batch: Batch, columns: Mapping[str, Tensor], skip: Tensor | None) -> None:
    """Write the 0-d state of a step that was taken: `step` + 1, the others from ``columns``.

    Args:
        batch: Whose.
        columns: What `scalar_columns` gave.
        skip: As for `Backend.apply`.
    """
    if batch.device.type == "cpu":
        if skip is not None and is_set(skip):
            return
        for name, counters in batch.counters.items():
            new = [counter.item() + 1 for counter in counters] if name == "step" else columns[name].tolist()
            for counter, value in zip(counters, new, strict=True):
                counter[()] = value
    else:
        for name in batch.scalar_states[0]:
            tensors = [state[name] for state in batch.scalar_states]
            old = torch.stack(tensors)
            moved = old + 1 if name == "step" else columns[name].to(old.dtype)
            if skip is not None:
                moved = torch.where(skip != 0, old, moved)
            torch._foreach_copy_(tensors, list(moved.unbind()))
    if batch.rounding_keys:
        advance(batch.rounding_keys, skip)


def _numbers(batch: Batch, group: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of tensors that share ``group`` and 0-d state; floats, or float64 tensors."""
    step = old["step"] + 1 if "step" in old else 1.0
    others = {name: value for name, value in old.items() if name != "step"}
    decay, l2 = batch.rule.decay(group, group_decay(group))
    shared = {"inverse_divisor": -1.0 if group["maximize"] else 1.0, "decay": decay, "l2": l2}
    # Without a second moment `eps` is another optimizer's, in a group that only borrows this rule.
    eps = group.get("eps", 0.0) if batch.rule.second_moment else 0.0
    shared |= {"eps": eps, "bias_correction2_sqrt": 1.0, "largest": batch.largest}
    return shared | batch.rule.scalars(group, step, **others)


def _host_columns(batch: Batch) -> dict[str, Tensor]:
    # Tensors that share all 0-d state and the group share a row of numbers; nearly always there is one per group.
    states = list(batch.counters)
    old = [[counter.item() for counter in counters] for counters in batch.counters.values()]
    keys = list(zip(map(id, batch.groups), *old, strict=True))
    groups = dict(zip(keys, batch.groups, strict=True))
    numbers = [
        _numbers(batch, _readable(group), dict(zip(states, key[1:], strict=True))) for key, group in groups.items()
    ]
    names = list(numbers[0])
    table = torch.tensor([[float(row[name]) for row in numbers] for name in names], dtype=torch.float64, device="cpu")
    if len(numbers) == 1:
        return dict(zip(names, table.expand(-1, len(keys)), strict=True))
    number_of = {key: number for number, key in enumerate(groups)}
    return dict(zip(names, table[:, [number_of[key] for key in keys]], strict=True))


def _readable(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group with one-element tensors (a learning rate, say) as floats."""
    return {k: read(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}


def _device_columns(batch: Batch) -> dict[str, Tensor]:
    device, dtype = batch.device, widest_dtype(batch.device)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(batch.groups):
        members.setdefault(id(group), []).append(i)
    parts: dict[str, list[tuple[Scalar, int]]] = {}
    for indices in members.values():
        group = {
            k: (v.to(device, dtype, non_blocking=True) if v.device.type != "cpu" else read(v))
            if isinstance(v, Tensor)
            else v
            for k, v in batch.groups[indices[0]].items()
            if k != "params"
        }
        old = {
            name: torch.stack([batch.scalar_states[i][name] for i in indices]).to(dtype)
            for name in batch.scalar_states[indices[0]]
        }
        for name, value in _numbers(batch, group, old).items():
            parts.setdefault(name, []).append((value, len(indices)))
    # Here a launch costs more than what it does: plain numbers go over in one copy, the others join them.
    plain = [name for name, values in parts.items() if not any(isinstance(value, Tensor) for value, _ in values)]
    table = upload([[v for v, count in parts[name] for _ in range(count)] for name in plain], device, dtype)
    columns = dict(zip(plain, table.unbind(), strict=True))
    for name in parts.keys() - columns.keys():
        filled = [
            v.to(dtype).expand(count) if isinstance(v, Tensor) else torch.full((count,), v, dtype=dtype, device=device)
            for v, count in parts[name]
        ]
        columns[name] = torch.cat(filled) if len(filled) > 1 else filled[0]
    order = [i for indices in members.values() for i in indices]
    if order != sorted(order):
        inverse = upload(sorted(range(len(order)), key=order.__getitem__), device)
        columns = {name: column[inverse] for name, column in columns.items()}
    return columns
