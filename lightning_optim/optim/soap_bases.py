"""Bases of SOAP: which a parameter has, rotations into them, Gram matrices, and their eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels.base import largest
from lightning_optim.optim.matrix_form import MatrixForm, matrix_form

Bases = list[Tensor | None]
"""One basis per dimension, [size, size]; None for a dimension that is not rotated."""


def form_of(param: Tensor, group: Mapping[str, Any]) -> MatrixForm | None:
    """Return how ``param`` is cut into matrices; None if it has a basis for each dimension as it is."""
    cut = group.get("split") is not None or (param.dim() > 2 and group.get("flatten") is not None)
    return matrix_form(param, group) if cut and param.dim() > 1 else None


def taken(tensor: Tensor, form: MatrixForm | None) -> list[Tensor]:
    """Return the parts of ``tensor``, of which a form is one for each size of its pieces."""
    return [tensor] if form is None else form.take(tensor)


def name_of(kind: str, dim: int, run: int) -> str:
    """Return the key of the state `GG` or `Q` for a dimension of a part."""
    return f"{kind}_{dim}_{run}" if run else f"{kind}_{dim}"


def parts_of(param: Tensor, group: Mapping[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return for each part of ``param`` how many matrices it has, as (matrices,) or (), and the sizes of each.

    Only the shape of ``param`` is read, which may be sharded.
    """
    form = form_of(param, group)
    if form is None:
        return [((), tuple(param.shape))]
    shapes = [part.shape for part in form.take(torch.empty(param.shape, device="meta"))]
    return [(tuple(shape[:-2]), tuple(shape[-2:])) for shape in shapes]


def preconditioned(sizes: Sequence[int], group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the dimensions that have a basis, with their sizes."""
    if len(sizes) == 1 and not group["precondition_1d"]:
        return []
    return [(dim, size) for dim, size in enumerate(sizes) if size <= group["max_precondition_dim"]]


def average_square(grad: Tensor, bases: Bases, old: Tensor, weight: Tensor, most: float) -> Tensor:
    """Return the new average of squares in the coordinates of ``bases``, shape of ``grad``."""
    rotated = rotate(grad, bases)  # This is the gradient itself, or a view of it, if there is no basis at all.
    squares = rotated.square() if all(basis is None for basis in bases) else rotated.square_()
    # An infinite square would never leave the average.
    return torch.lerp(old, squares.clamp_(max=most), weight)


def direction_in(exp_avg: Tensor, exp_avg_sq: Tensor, bases: Bases, eps: float) -> Tensor:
    """Return Adam's direction in the coordinates of ``bases``, rotated back, as a new tensor, shape of ``exp_avg``."""
    root = exp_avg_sq.sqrt().add_(eps)
    torch.div(rotate(exp_avg, bases), root, out=root)
    return rotate(root, bases, back=True)


def rotate(x: Tensor, bases: Bases, back: bool = False) -> Tensor:
    """Rotate ``x`` into the coordinates of ``bases``, or back from them."""
    if x.dim() > len(bases):  # a stack of matrices
        left, right = bases
        x = x if left is None else (left if back else left.mT) @ x
        return x if right is None else x @ (right.mT if back else right)
    for basis in bases:  # Each iteration moves the first dimension to the end.
        x = x.movedim(0, -1) if basis is None else torch.tensordot(x, basis, dims=([0], [int(back)]))
    return x


def gram_matrix(grad: Tensor, dim: int, lead: int) -> Tensor:
    """Return the Gram matrix of the slices of ``grad`` along ``dim``, [size, size], or of each matrix of a stack.

    Elements are limited so that no sum of products overflows: an infinity would never leave the average, and one minus
    another is NaN.
    """
    if lead:
        rows = grad if dim == 0 else grad.mT
    else:
        rows = grad.movedim(dim, 0).flatten(1) if grad.dim() > 1 else grad[:, None]
    bound = 0.5 * math.sqrt(largest(grad.dtype) / max(rows.shape[-1], 1))
    rows = rows.clamp(-bound, bound)
    return rows @ rows.mT


def reordered(x: Tensor, dim: int, order: Tensor) -> Tensor:
    """Return ``x`` in another order along ``dim``, which each matrix of a stack has for itself."""
    if order.dim() == 1:
        return x.index_select(dim, order)
    return x.take_along_dim(order[:, :, None] if dim == 1 else order[:, None], dim)


def _moderate(gram: Tensor) -> Tensor:
    """Return ``gram``, [..., size, size], times powers of two against overflow, which keep its eigenvectors."""
    if not gram.numel():  # torch has no maximum of an empty tensor.
        return gram.clone()
    most = torch.maximum(-gram.amin((-2, -1), keepdim=True), gram.amax((-2, -1), keepdim=True))
    return gram * torch.where(most > 2.0**100, 2.0**-100, 1.0)


def eigenvectors(gram: Tensor) -> Tensor:
    """Return the eigenvectors of ``gram`` as columns, [..., size, size], in descending order of eigenvalues."""
    gram = _moderate(gram)
    finite = gram.isfinite().flatten(-2).all(-1)[..., None, None]
    # LAPACK raises an error on NaN, which has to propagate to parameters and state as in any other optimizer.
    gram.masked_fill_(~finite, 0.0).diagonal(0, -2, -1).add_(torch.where(finite[..., 0], 1e-30, 1.0))
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    del gram
    return vectors.flip(-1).masked_fill_(~finite, torch.nan)


def power_iteration(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis closer to the eigenvectors, [..., size, size], and the order of the old vectors, [..., size]."""
    product = _moderate(gram) @ basis
    order = (basis * product).sum(-2).argsort(-1, descending=True)
    product = product[:, order] if product.dim() == 2 else product.take_along_dim(order[:, None], -1)
    # QR runs in float32, as in the authors' code: it is accurate enough, and every device supports it.
    return torch.linalg.qr(product.float()).Q.to(gram.dtype), order
