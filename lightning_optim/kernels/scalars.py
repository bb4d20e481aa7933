"""Per-tensor scalars of one step, computed from groups and 0-d state, on the host where it may read these."""

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
    """Compute all scalars that the update of a batch needs.

    These are the scalars that `rule.scalars` returns, `new_<name>` for each of the rule's shared values, the scalars of
    the backends and step sums (`inverse_divisor`, negative for `maximize`, `decay`, `l2`, `eps` and
    `bias_correction2_sqrt`), and `largest`, which rules may use.

    Args:
        batch: The batch.
        divisor: Divisor of the gradients, shape [] or [tensors]; None for 1.

    Returns:
        The scalars by name, [tensors] each, float64 (float32 on MPS), on the device of the batch.
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
    """Update the 0-d state after a step: `step` + 1, and the other values from ``columns``.

    Args:
        batch: The batch, whose `scalar_states` and `rounding_keys` are written.
        columns: Scalars from `scalar_columns`, [tensors] each.
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
    """Compute the scalars of tensors that share ``group`` and 0-d state: floats, or float64 tensors, [tensors]."""
    step = old["step"] + 1 if "step" in old else 1.0
    others = {name: value for name, value in old.items() if name != "step"}
    decay, l2 = batch.rule.decay(group, group_decay(group))
    shared = {"inverse_divisor": -1.0 if group["maximize"] else 1.0, "decay": decay, "l2": l2}
    # A rule without a second moment may run in a group of another optimizer, whose `eps` is not meant for it.
    eps = group.get("eps", 0.0) if batch.rule.second_moment else 0.0
    shared |= {"eps": eps, "bias_correction2_sqrt": 1.0, "largest": batch.largest}
    return shared | batch.rule.scalars(group, step, **others)


def _host_columns(batch: Batch) -> dict[str, Tensor]:
    # Tensors with equal 0-d state and the same group share a row of scalars; there is nearly always one per group.
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
    """Return the group with one-element tensors, such as a learning rate, converted to floats."""
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
    # Launches cost more than the work itself here, so all plain numbers are uploaded in one copy.
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
