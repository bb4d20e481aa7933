"""Tensors piece by piece: on the CPU, torch's reductions into a wider dtype first copy all that they read.

Temporaries of a piece stay in the cache, and their size does not depend on that of the tensor. A tensor that is not
larger than a piece is read in one operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_optim.kernels.rounding import PIECE, PIECE_ELSEWHERE

Index = tuple[int | slice, ...]


def piece_size(device: torch.device) -> int:
    """Return the largest number of elements of a piece on ``device``."""
    return PIECE.get(device.type, PIECE_ELSEWHERE)


def pieces(shape: torch.Size, device: torch.device) -> Iterator[Index]:
    """Cut a tensor into pieces of at most `rounding.PIECE` elements.

    Args:
        shape: Shape of the tensor.
        device: Device of the tensor, on which the size of a piece depends.

    Yields:
        Indices of the pieces, in row-major order, for `take`.
    """
    yield from _cut(tuple(shape), piece_size(device))


def take(tensor: Tensor, index: Index) -> Tensor:
    """Return one piece of ``tensor`` as a view; the tensor itself if it is all of it."""
    return tensor[index] if index else tensor


def norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of ``tensor``, any shape, as one vector, computed in ``dtype``, shape []."""
    parts = [take(tensor, index) for index in pieces(tensor.shape, tensor.device)]
    norms = [torch.linalg.vector_norm(part, dtype=dtype) for part in parts]
    result: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return result


def _cut(shape: tuple[int, ...], size: int) -> Iterator[Index]:
    if math.prod(shape) <= size:
        yield ()
        return
    row = math.prod(shape[1:])
    if row <= size:
        yield from ((slice(first, first + size // row),) for first in range(0, shape[0], size // row))
        return
    for i in range(shape[0]):
        yield from ((i, *rest) for rest in _cut(shape[1:], size))
