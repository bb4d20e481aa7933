"""Sums over whole tensors where each rank holds a shard (DTensor: FSDP2, tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.transfer import upload

PLAIN = (Tensor, torch.nn.Parameter)
"""Nearly always; and to ask for an attribute that is missing takes far longer than to look here first."""


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    if type(tensor) in PLAIN:
        return tensor
    to_local = getattr(tensor, "to_local", None)  # asks for no import of torch.distributed
    return tensor if to_local is None else to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of ``tensor``."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def sum_over_shards(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add per-tensor ``sums`` ([tensors] or [tensors, columns]) over the ranks among which each tensor is sharded.

    One all-reduce per mesh dimension and kind of placement; nothing is done, and nothing copied, for plain tensors.
    Square sums add across shards; norms do not.
    """
    return _reduce(sums, tensors, "SUM")


def max_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The largest of per-tensor ``values``, else as `sum_over_shards`; NaN if any rank has one."""
    # MAX may drop a NaN, depending on the library that communicates, but none drops an infinity.
    largest = _reduce(values.nan_to_num(nan=torch.inf, posinf=torch.inf), tensors, "MAX")
    return torch.where(values.isnan(), values, largest)


def sum_split_units(sums: Tensor, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Add sums of output units ([columns, units]) over the ranks that hold parts of one unit.

    Ranks that share a matrix by its rows hold whole units, and need not talk. One all-reduce per mesh dimension.

    Args:
        sums: One entry for each unit of this rank's part of each tensor.
        tensors: The tensors.
        shapes: What units each has here: [rows, 1, 1], or [] for one.
    """
    kinds: dict[tuple[Any, int], list[int]] = {}
    for i, tensor in enumerate(tensors):
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if placement.is_shard() and (tensor.dim() <= 1 or placement.dim != 0):
                kinds.setdefault((tensor.device_mesh, dim), []).append(i)  # type: ignore[attr-defined]
    if not kinds:
        return sums
    parts = list(torch.split(sums, [math.prod(shape) for shape in shapes], dim=1))
    for (mesh, dim), indices in kinds.items():
        packed = torch.cat([parts[i] for i in indices], dim=1)
        torch.distributed.all_reduce(packed, group=mesh.get_group(dim))
        for i, part in zip(indices, torch.split(packed, [parts[i].shape[1] for i in indices], dim=1), strict=True):
            parts[i] = part
    return torch.cat(parts, dim=1)


def _reduce(sums: Tensor, tensors: Sequence[Tensor], operation: str) -> Tensor:
    kinds: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if type(tensor) in PLAIN:
            continue
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None:
            sharded = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_shard())  # type: ignore[attr-defined]
            if sharded:
                kinds.setdefault((mesh, sharded), []).append(i)
    if not kinds:
        return sums
    sums = sums.clone()
    for (mesh, dims), indices in kinds.items():
        rows = upload(indices, sums.device)
        part = sums[rows]
        for dim in dims:
            torch.distributed.all_reduce(part, getattr(torch.distributed.ReduceOp, operation), mesh.get_group(dim))
        sums[rows] = part
    return sums
