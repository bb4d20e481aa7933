"""Placement of DTensor gradients as their parameters are placed.

Under tensor parallelism autograd leaves some of them otherwise: as terms of a sum that no rank has taken yet
(`Partial`, of norms that each rank applies to its part of the sequence), or whole on every rank beside a parameter of
which each has a part (`Replicate` beside `Shard`, of embeddings). What lies on a rank then belongs to other elements
than the rank's part of the parameter, or is not the gradient of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
"""The usual types. Looking here first is far faster than asking for an attribute that is missing."""


def is_split(placement: Any) -> bool:
    """Whether ranks hold different parts along this mesh dimension.

    Not `Placement.is_shard`, which torch 2.13 denies of `_StridedShard`, that of FSDP2 over tensor parallelism.
    """
    return not (placement.is_replicate() or placement.is_partial())


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of ``tensor``."""
    return any(map(is_split, getattr(tensor, "placements", ())))


def is_partial(tensor: Tensor) -> bool:
    """Whether ranks hold terms of ``tensor`` that have not been added up."""
    return any(placement.is_partial() for placement in getattr(tensor, "placements", ()))


def gradient_of(param: Tensor, label: Callable[[], str] = lambda: "a parameter") -> Tensor | None:
    """``param.grad``, with the placements of ``param``; None if there is none.

    Whatever reads gradients asks here first. One that is placed otherwise is redistributed, and the result takes its
    place in ``param.grad``: the same gradient, held by other ranks. So it is done once however many read it, what a
    clip rule rewrites in place is what the update finds, and nothing is held twice. torch's optimizers would come to
    the same weights by themselves, for each of their DTensor operations redistributes anew.

    A collective: all ranks ask for the same parameters in the same order. A plain gradient beside a DTensor is taken
    to be the whole gradient, the same on all ranks.

    Args:
        param: The parameter.
        label: How messages call it.

    Raises:
        ValueError: The parameter is `Partial`, or the gradient lies on another device mesh.
    """
    grad = param.grad
    if grad is None or (type(param) in PLAIN and type(grad) in PLAIN) or grad.layout != torch.strided:
        return grad
    mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", None)
    given_mesh, given = getattr(grad, "device_mesh", None), getattr(grad, "placements", None)
    if is_partial(param):
        raise ValueError(partial_refused(label(), param))
    if given == placements and given_mesh == mesh:
        return grad
    if mesh is not None and given_mesh is not None and given_mesh != mesh:
        raise ValueError(
            f"The gradient of {label()} is a DTensor on {given_mesh}, the parameter on {mesh}. Needed is one device "
            "mesh for both: give it in one `parallelize_module`, or `fully_shard` over a mesh that includes it."
        )
    param.grad = placed_as(grad.detach(), param)
    return param.grad


def partial_refused(label: str, param: Tensor) -> str:
    """Why a parameter that is `Partial` cannot be optimized."""
    return (
        f"{label} is a DTensor with placements {getattr(param, 'placements', ())}: each rank holds a term of a sum "
        "that is taken nowhere, so there is no parameter to update. Redistribute it to Replicate or Shard before the "
        "optimizer is made."
    )


@torch.no_grad()
def placed_as(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` with the placements of ``param``. A collective, unless it has them already.

    Args:
        tensor: A gradient or state. A plain one is taken to be whole, and the same on all ranks; one of another shape
            than the parameter's, say a factor, is returned as it is.
        param: The parameter, a DTensor or plain.
    """
    given: Any = tensor
    if (type(given) in PLAIN and type(param) in PLAIN) or given.shape != param.shape:
        return tensor
    mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", ())
    given_mesh = getattr(given, "device_mesh", None)
    if given_mesh == mesh and getattr(given, "placements", ()) == placements:
        return tensor
    if given_mesh is not None and given_mesh != mesh:
        given = given.full_tensor()
    if mesh is None:
        return given  # type: ignore[no-any-return]
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * mesh.ndim
    if not isinstance(given, DTensor):
        given = DTensor.from_local(given, mesh, whole, run_check=False)
    # torch reaches a strided shard from whole tensors only (2.13).
    if not all(placement.is_shard() for placement in (*placements, *given.placements) if is_split(placement)):
        given = given.redistribute(placements=whole)
    return given.redistribute(placements=placements)  # type: ignore[no-any-return]


@torch.no_grad()
def added_up(tensor: Tensor) -> Tensor:
    """``tensor`` without `Partial`: terms added up, so that each rank has numbers of the tensor itself."""
    if type(tensor) in PLAIN or not is_partial(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    given: Any = tensor.detach()
    whole = [Replicate() if placement.is_partial() else placement for placement in given.placements]
    return given.redistribute(placements=whole)  # type: ignore[no-any-return]
