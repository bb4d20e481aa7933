"""Layouts of DTensors over ranks: which part of a tensor a rank holds, and where state of another shape is placed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core.placements import is_sharded, is_split, placed_as


class Split(NamedTuple):
    """Cut of a DTensor along one of its dimensions, over the ranks of one mesh dimension.

    Args:
        mesh: The device mesh.
        mesh_dim: Index of the mesh dimension whose ranks hold different parts.
        dim: The dimension of the tensor that is cut.
    """

    mesh: Any
    mesh_dim: int
    dim: int


def split_of(tensor: Tensor) -> Split | None:
    """Return how ``tensor`` is cut; None if it is not cut, more than once, or into strided parts."""
    cuts = [(i, placement) for i, placement in enumerate(getattr(tensor, "placements", ())) if is_split(placement)]
    if len(cuts) != 1 or not cuts[0][1].is_shard():
        return None
    mesh_dim, placement = cuts[0]
    return Split(tensor.device_mesh, mesh_dim, placement.dim)  # type: ignore[attr-defined]


def rows_of_rank(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the first of the rows that ``rank`` holds of ``size``, and their number: as `torch.chunk`, then none.

    Example:
        >>> [rows_of_rank(7, rank, 4) for rank in range(4)]
        [(0, 2), (2, 2), (4, 2), (6, 1)]
        >>> [rows_of_rank(1, rank, 3) for rank in range(3)]
        [(0, 1), (1, 0), (1, 0)]
    """
    step = -(-size // ranks)
    first = min(step * rank, size)
    return first, min(step, size - first)


@torch.no_grad()
def placed_state(state: Tensor, param: Tensor) -> Tensor:
    """Place a state of a tensor rule over the ranks among which ``param`` is sharded.

    State in the shape of the parameter is placed as it is. Any other, such as a factor, is cut by its rows over the
    ranks of the first mesh dimension that cuts the parameter, whatever they mean: so no rank holds all of it, and a
    distributed checkpoint can be loaded by another number of ranks. A number, shape [], stays plain.

    Args:
        state: The state, a DTensor, or a plain tensor that is whole and equal on all ranks.
        param: The parameter.

    Returns:
        A DTensor if ``param`` is sharded and ``state`` has a dimension, else ``state``.
    """
    given: Any = state
    if not is_sharded(param) or given.dim() == 0:
        return state
    if given.shape == param.shape:
        return placed_as(state, param)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    first = next(i for i, placement in enumerate(placements) if is_split(placement))
    wanted = tuple(Shard(0) if i == first else Replicate() for i in range(mesh.ndim))
    if isinstance(given, DTensor):
        if given.device_mesh == mesh and given.placements == wanted:
            return given
        given = given.full_tensor()
    given = DTensor.from_local(given, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # A part of a tensor would keep the memory of all of it.
    return given.redistribute(placements=wanted).clone()  # type: ignore[no-any-return]


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole tensor on every rank of the mesh of ``like``. This is a collective.

    Args:
        part: This rank's part, of any dtype, in the shape of the local tensor of ``like``.
        like: A DTensor.
    """
    from torch.distributed.tensor import DTensor

    given: Any = like
    whole = DTensor.from_local(
        part.contiguous(),
        given.device_mesh,
        given.placements,
        run_check=False,
        shape=given.shape,
        stride=_row_major(given.shape),
    )
    result: Tensor = whole.full_tensor()
    return result


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that every rank has whole, placed as the DTensor ``like``."""
    from torch.distributed.tensor import DTensor, Replicate

    given: Any = like
    replicated = DTensor.from_local(whole, given.device_mesh, [Replicate()] * given.device_mesh.ndim, run_check=False)
    part: Tensor = replicated.redistribute(placements=given.placements).to_local()
    return part


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
