"""Sums over whole tensors where each rank holds a shard (DTensor: FSDP2, tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.placements import PLAIN, is_split
from lightning_optim.core.transfer import upload


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    if type(tensor) in PLAIN:
        return tensor
    to_local = getattr(tensor, "to_local", None)  # needs no import of torch.distributed
    part: Tensor = tensor if to_local is None else to_local()
    if type(part) in PLAIN:
        return part
    wait = getattr(part, "wait", None)  # of what a collective has still to deliver, which has no memory yet
    return part if wait is None else wait()


def sum_over_shards(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add per-tensor ``sums`` ([tensors] or [tensors, columns]) over the ranks among which each tensor is sharded.

    One all-reduce per mesh dimension; nothing is done, and nothing copied, for plain tensors. Square sums add across
    shards; norms do not. Of what several ranks hold alike one rank's sums count, but a NaN of any: so the result is the
    same on all ranks, bit for bit, even if a replica has gone wrong, and all decide alike.
    """
    return _reduce(sums, tensors, "SUM")


def max_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The largest of per-tensor ``values``, else as `sum_over_shards`; infinite where a rank's shard has a NaN."""
    return _reduce(values, tensors, "MAX")


def max_over_ranks(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The largest ``flag`` ([]) of the ranks that hold ``tensors``, where some of these are plain beside DTensors.

    What is computed from DTensors is the same on all ranks already (`sum_over_shards`). The gradient of a plain tensor
    should be, but a NaN in it may have come up on one rank alone; what they decide from it has to be the same still.
    """
    kinds = set(map(type, tensors))
    if kinds.isdisjoint(PLAIN) or kinds.issubset(PLAIN):
        return flag
    flag = flag.clone()
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if hasattr(t, "device_mesh")):
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
    return flag


def sum_split_units(sums: Tensor, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Add sums of output units ([columns, units]) over the ranks that hold parts of one unit.

    Ranks that share a matrix by its rows hold whole units, and communicate nothing. One all-reduce per mesh dimension.

    Args:
        sums: One entry for each unit of this rank's part of each tensor.
        tensors: The tensors.
        shapes: What units each has here: [rows, 1, 1], or [] for one.
    """
    kinds: dict[tuple[Any, int], list[int]] = {}
    for i, tensor in enumerate(tensors):
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if is_split(placement) and (tensor.dim() <= 1 or placement.dim != 0):
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
    if set(map(type, tensors)).issubset(PLAIN):
        return sums
    meshes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh.get_coordinate() is not None:  # else it lies on other ranks altogether
            meshes.setdefault(mesh, []).append(i)
    if not meshes:
        return sums
    sums = sums.clone()
    for mesh, indices in meshes.items():
        rows = upload(indices, sums.device)
        part = sums[rows]
        if operation == "MAX":  # it may drop a NaN, depending on the library that communicates, but no infinity
            part = part.nan_to_num(nan=torch.inf, posinf=torch.inf)
        elif copies := [place for place, i in enumerate(indices) if _is_copy(tensors[i])]:
            part[upload(copies, sums.device)] *= 0  # NaN and infinities stay, as NaN
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(part, getattr(torch.distributed.ReduceOp, operation), mesh.get_group(dim))
        sums[rows] = part
    return sums


def _is_copy(tensor: Any) -> bool:
    """Whether another rank has the same part of ``tensor`` and comes first."""
    where = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
    return any(place and not is_split(placement) for placement, place in where)
