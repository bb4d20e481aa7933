"""Reductions over whole tensors of which each rank holds a shard (DTensors of FSDP2 and tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.placements import PLAIN, is_split
from lightning_optim.core.transfer import upload


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; return any other tensor unchanged."""
    if type(tensor) in PLAIN:
        return tensor
    to_local = getattr(tensor, "to_local", None)  # This does not import torch.distributed.
    part: Tensor = tensor if to_local is None else to_local()
    if type(part) in PLAIN:
        return part
    wait = getattr(part, "wait", None)  # The result of a running collective has no memory yet.
    return part if wait is None else wait()


def sum_over_shards(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add per-tensor sums over the ranks among which each tensor is sharded.

    This takes one all-reduce per mesh dimension, and returns ``sums`` itself for plain tensors. Square sums are
    additive over shards; norms are not. Of replicated data only the sums of one rank count, except that a NaN of any
    rank counts. The result is therefore the same on all ranks, bit for bit, even if a replica has diverged, so that all
    ranks make the same decisions.

    Args:
        sums: Sums of this rank's shards, [tensors] or [tensors, columns].
        tensors: The tensors.

    Returns:
        Shape and dtype of ``sums``.
    """
    return _reduce(sums, tensors, "SUM")


def max_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Compute per-tensor maxima, else as `sum_over_shards`; infinite where the shard of any rank has a NaN."""
    return _reduce(values, tensors, "MAX")


def max_over_ranks(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Compute the maximum of a flag over the ranks that hold ``tensors``, if these mix plain tensors and DTensors.

    Statistics of DTensors are the same on all ranks already (`sum_over_shards`). The gradient of a plain tensor should
    be as well, but a NaN in it may have occurred on one rank only, and all ranks must still make the same decision.

    Args:
        flag: The flag of this rank, shape [].
        tensors: The tensors.

    Returns:
        Shape [].
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
    """Add the sums of output units over the ranks that hold parts of one unit.

    Ranks among which a matrix is sharded by rows hold whole units and do not communicate. Otherwise this takes one
    all-reduce per mesh dimension.

    Args:
        sums: Sums of the units in this rank's shard of each tensor, [columns, units].
        tensors: The tensors.
        shapes: Local shape of the units of each tensor: [rows, 1, 1], or [] if the tensor is one unit.

    Returns:
        Shape [columns, units].
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
        if mesh is not None and mesh.get_coordinate() is not None:  # This rank is part of the mesh.
            meshes.setdefault(mesh, []).append(i)
    if not meshes:
        return sums
    sums = sums.clone()
    for mesh, indices in meshes.items():
        rows = upload(indices, sums.device)
        part = sums[rows]
        if operation == "MAX":  # Some communication libraries drop a NaN, but none an infinity.
            part = part.nan_to_num(nan=torch.inf, posinf=torch.inf)
        elif copies := [place for place, i in enumerate(indices) if _is_copy(tensors[i])]:
            part[upload(copies, sums.device)] *= 0  # NaN and infinities become NaN.
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(part, getattr(torch.distributed.ReduceOp, operation), mesh.get_group(dim))
        sums[rows] = part
    return sums


def _is_copy(tensor: Any) -> bool:
    """Return whether a rank that precedes this one holds the same shard of ``tensor``."""
    where = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
    return any(place and not is_split(placement) for placement, place in where)
