"""Per-tensor scalars of one step, computed from groups and 0-d state, on the host where it may read these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.core.host import is_set, read, widest_dtype
from lightning_optim.core.suggest import nearest
from lightning_optim.core.transfer import upload
from lightning_optim.kernels import averages
from lightning_optim.kernels.base import Batch, Numbers
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
    columns: dict[str, Tensor] = _host_columns(batch) if batch.device.type == "cpu" else _device_columns(batch)
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
            if name != "step":
                _write(counters, columns[name].numpy())
            elif isinstance(columns, HostColumns):
                _write(counters, columns.steps + 1)
            else:
                _write(counters, _read(counters) + 1)
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


def numbers_of_group(batch: Batch, group: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the scalars of tensors that share ``group`` and 0-d state ``old``; numbers of any kind of `Scalar`."""
    step = old["step"] + 1 if "step" in old else 1.0
    others = {name: value for name, value in old.items() if name not in ("step", averages.STEP)}
    decay, l2 = batch.rule.decay(group, group_decay(group))
    shared = {"inverse_divisor": -1.0 if group["maximize"] else 1.0, "decay": decay, "l2": l2}
    # A rule without a second moment may run in a group of another optimizer, whose `eps` is not meant for it.
    eps = group.get("eps", 0.0) if batch.rule.second_moment else 0.0
    shared |= {"eps": eps, "bias_correction2_sqrt": 1.0, "largest": batch.largest}
    if batch.averages:
        shared |= averages.scalars(group["ema"], old[averages.STEP] + 1)
    return shared | batch.rule.scalars(group, step, **others)


def places_of(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the places of scalars among those that a rule gives.

    Raises:
        TypeError: The rule does not give one of them.
    """
    try:
        return list(map(names.index, wanted))
    except ValueError:
        name = next(name for name in wanted if name not in names)
        raise TypeError(
            f"`update` of the rule takes {name!r}, which its `scalars` does not return. {nearest(name, names)}"
        ) from None


class HostColumns(dict[str, Tensor]):
    """Scalars by name, on the host, as the rows of a few different kinds of tensors.

    There is nearly always one kind per group, so a column, float64, [tensors], is made only where it is asked for.

    Args:
        numbers: The scalars of each kind, by the same names.
        kinds: Kind of each tensor, int64, [tensors].
    """

    def __init__(self, numbers: Sequence[Mapping[str, Any]], kinds: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self.names = list(numbers[0])
        rows = [[float(row[name]) for name in self.names] for row in numbers]
        self.rows = np.array(rows, dtype=np.float64)
        """[kinds, names]."""
        self.kinds = kinds
        self.steps: npt.NDArray[np.float64] = np.zeros(0)
        """Step counts from which the scalars are computed, [tensors], if there are any."""

    def __missing__(self, name: str) -> Tensor:
        place = self.names.index(name) if name in self.names else places_of([name], self.names)[0]
        column = self[name] = torch.from_numpy(self.rows[self.kinds, place])
        return column

    def complete(self) -> HostColumns:
        """Make all columns that have not been asked for; return ``self``."""
        for name in self.names:
            self[name]
        return self

    def divide(self, name: str, divisor: Tensor) -> None:
        """Divide a column by ``divisor``, shape [] or [tensors]."""
        if divisor.dim() or name in self:
            self[name] = self[name] / divisor.to(torch.float64)
        else:
            with np.errstate(all="ignore"):  # as torch divides
                self.rows[:, self.names.index(name)] /= read(divisor.to(torch.float64))

    def table(self, names: Sequence[str], dtype: torch.dtype) -> npt.NDArray[np.floating]:
        """Return the columns called ``names`` side by side, [tensors, names], in ``dtype``."""
        table = np.empty((len(self.kinds), len(names)), np.float64 if dtype == torch.float64 else np.float32)
        rows = self.rows[:, places_of([name if name not in self else self.names[0] for name in names], self.names)]
        with np.errstate(all="ignore"):  # as torch rounds
            table[:] = rows if len(rows) == 1 else rows[self.kinds]
        for i, name in enumerate(names):
            if name in self:
                table[:, i] = self[name].numpy()
        return table


def host_scalars(batch: Batch, divisor: Tensor | None) -> HostColumns:
    """Compute the same as `scalar_columns` for a batch on the CPU; columns are made where they are asked for."""
    old = {name: _read(counters) for name, counters in batch.counters.items()}
    columns = _host_scalars(batch, old)
    columns.steps = old.get("step", columns.steps)
    if batch.rounding_keys:
        columns.update(key_columns(batch.rounding_keys))
    for name, value in batch.shared.items():
        columns[f"new_{name}"] = value.expand(len(batch.params))
    if divisor is not None:
        columns.divide("inverse_divisor", divisor)
    return columns


def _read(counters: list[npt.NDArray[Any]] | Numbers) -> npt.NDArray[np.float64]:
    if isinstance(counters, list):
        return np.array([counter.item() for counter in counters], dtype=np.float64)
    return counters.read()


def _write(counters: list[npt.NDArray[Any]] | Numbers, values: npt.NDArray[np.float64]) -> None:
    if not isinstance(counters, list):
        counters.write(values)
        return
    for counter, value in zip(counters, values.tolist(), strict=True):
        counter[()] = value


def _host_scalars(batch: Batch, old: Mapping[str, npt.NDArray[np.float64]]) -> HostColumns:
    # Tensors with equal 0-d state and the same group share a row of scalars.
    groups, kinds = batch.members
    if all((values == values[0]).all() for values in old.values()):
        first = {name: values[0].item() for name, values in old.items()}
        return HostColumns([numbers_of_group(batch, _readable(group), first) for group in groups], kinds)
    keys = list(zip(kinds.tolist(), *(values.tolist() for values in old.values()), strict=True))
    number_of: dict[Any, int] = {}
    kinds = np.array([number_of.setdefault(key, len(number_of)) for key in keys], dtype=np.int64)
    numbers = [
        numbers_of_group(batch, _readable(groups[group]), dict(zip(old, values, strict=True)))
        for group, *values in number_of
    ]
    return HostColumns(numbers, kinds)


def _host_columns(batch: Batch) -> dict[str, Tensor]:
    old = {name: _read(counters) for name, counters in batch.counters.items()}
    return dict(_host_scalars(batch, old).complete())


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
        for name, value in numbers_of_group(batch, group, old).items():
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
