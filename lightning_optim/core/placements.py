"""Redistribution of DTensor gradients to the placements of their parameters.

Under tensor parallelism autograd gives some gradients other placements: `Partial`, terms of a sum that has not been
reduced (for norms that each rank applies to its part of the sequence), or `Replicate` for a parameter that is `Shard`
(for embeddings). The local tensor of such a gradient belongs to other elements than that of the parameter, or is not a
gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
"""The usual types. Testing for them first is much faster than looking up an attribute that is missing."""


def is_split(placement: Any) -> bool:
    """Return whether ranks hold different parts along the mesh dimension of ``placement``.

    `Placement.is_shard` is not used, because in torch 2.13 it is False for `_StridedShard`, the placement of FSDP2 over
    tensor parallelism.
    """
    return not (placement.is_replicate() or placement.is_partial())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ranks hold different parts of ``tensor``."""
    return any(map(is_split, getattr(tensor, "placements", ())))


def is_partial(tensor: Tensor) -> bool:
    """Return whether ranks hold terms of ``tensor`` that have not been summed."""
    return any(placement.is_partial() for placement in getattr(tensor, "placements", ()))


def gradient_of(param: Tensor, label: Callable[[], str] = lambda: "a parameter") -> Tensor | None:
    """Return ``param.grad`` with the placements of ``param``; None if there is no gradient.

    All code that reads gradients must call this function. A gradient with other placements is redistributed, and the
    result replaces ``param.grad``: it is the same gradient, distributed differently. This way the redistribution
    happens once, the update sees what a clip rule has rewritten in place, and no second copy is kept. torch's
    optimizers arrive at the same weights without it, because each of their DTensor operations redistributes its
    operands.

    This is a collective: all ranks must call it for the same parameters in the same order. The plain gradient of a
    DTensor parameter is treated as the whole gradient, equal on all ranks.

    Args:
        param: The parameter.
        label: Function that returns the name of the parameter for messages.

    Raises:
        ValueError: The parameter is `Partial`, or the gradient is on another device mesh.
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
            f"The gradient of {label()} is a DTensor on {given_mesh}, the parameter on {mesh}; both must be on one "
            "device mesh. Use the same mesh in `parallelize_module`, or `fully_shard` over a mesh that includes it."
        )
    param.grad = placed_as(grad.detach(), param)
    return param.grad


def partial_refused(label: str, param: Tensor) -> str:
    """Return the message that a parameter with `Partial` placements cannot be optimized."""
    return (
        f"{label} is a DTensor with placements {getattr(param, 'placements', ())}: each rank holds a term of a sum "
        "that is never computed, so there is no parameter to update. Redistribute it to Replicate or Shard before the "
        "optimizer is created."
    )


@torch.no_grad()
def placed_as(tensor: Tensor, param: Tensor) -> Tensor:
    """Redistribute ``tensor`` to the placements of ``param``. This is a collective, unless it has them already.

    Args:
        tensor: A gradient or state. A plain tensor is treated as whole and equal on all ranks. A tensor whose shape is
            not that of the parameter, such as a factor, is returned unchanged.
        param: The parameter, a DTensor or a plain tensor.

    Returns:
        A tensor in the shape of ``tensor``.
    """
    if (type(tensor) in PLAIN and type(param) in PLAIN) or tensor.shape != param.shape:
        return tensor
    return distributed(tensor, getattr(param, "device_mesh", None), getattr(param, "placements", ()))


@torch.no_grad()
def distributed(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    """Redistribute ``tensor`` to ``placements``. This is a collective, unless it has them already.

    Args:
        tensor: A tensor of any shape. A plain tensor is treated as whole and equal on all ranks.
        mesh: The device mesh; None for the whole tensor on each rank.
        placements: A placement for each dimension of the mesh.

    Returns:
        A tensor in the shape of ``tensor``.
    """
    given: Any = tensor
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
    # torch 2.13 can redistribute to a strided shard from replicated tensors only.
    if not all(placement.is_shard() for placement in (*placements, *given.placements) if is_split(placement)):
        given = given.redistribute(placements=whole)
    return given.redistribute(placements=placements)  # type: ignore[no-any-return]


@torch.no_grad()
def added_up(tensor: Tensor) -> Tensor:
    """Redistribute `Partial` placements of ``tensor`` to `Replicate`, which sums their terms."""
    if type(tensor) in PLAIN or not is_partial(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    given: Any = tensor.detach()
    whole = [Replicate() if placement.is_partial() else placement for placement in given.placements]
    return given.redistribute(placements=whole)  # type: ignore[no-any-return]
