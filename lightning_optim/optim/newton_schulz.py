"""Newton-Schulz iteration: the nearest (semi-)orthogonal matrix, from matrix products only, many matrices at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵; chosen by Jordan et al. to raise small singular values as fast as possible.
Singular values do not converge to 1 but land between about 0.7 and 1.2 after five steps, which serves as well."""

LARGEST_STACK = {"cpu": 2**21}
"""Elements in one stack, by device: as many as temporaries leave in the CPU's cache."""

LARGEST_STACK_ELSEWHERE = 2**25
"""64 MB in bfloat16: more gains no speed, and costs a few times that in temporaries."""


def orthogonalize(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """U·Vᵀ of each matrix U·S·Vᵀ, nearly: all singular values brought close to 1.

    Matrices of one shape, or of the transposed one, are stacked: on a GPU, and on the CPU's cores, one batched product
    is faster than many small ones, and the wide form of a matrix has the smaller Gram matrix.

    Args:
        matrices: Shape [rows, columns] each, on one device, of any floating dtype.
        coefficients: (a, b, c) of the quintic.
        steps: Number of iterations.
        eps: Smallest norm that is divided by.
        dtype: What the iteration runs in.

    Returns:
        Matrices of the shapes given, in ``dtype``.

    Example:
        >>> (x,) = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])], dtype=torch.float32)
        >>> bool((x.diagonal() > 0.6).all())
        True
    """
    results: dict[int, Tensor] = {}
    for part in stacks(matrices):
        done = orthogonalize_stack([matrices[i] for i in part], coefficients, steps, eps, dtype)
        results.update(zip(part, done, strict=True))
    return [results[i] for i in range(len(matrices))]


def stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of the matrices that are orthogonalised together: of one shape or its transpose, in stacks of some size.

    Args:
        matrices: Shapes and device are read only; of more dimensions, all but the first are one.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        rows = matrix.shape[0]
        columns = matrix.shape[1:].numel()
        by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(i)
    for (rows, columns), indices in by_shape.items():
        largest = LARGEST_STACK.get(matrices[indices[0]].device.type, LARGEST_STACK_ELSEWHERE)
        size = max(1, largest // max(rows * columns, 1))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def orthogonalize_stack(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """`orthogonalize` for matrices of one shape or its transpose, all in one stack."""
    wide = [_wide(matrix.to(dtype)) for matrix in matrices]
    if len(wide) == 1:
        done = [_iterate(wide[0], coefficients, steps, eps)]
    else:
        done = list(_iterate(torch.stack(wide), coefficients, steps, eps).unbind())
    return [x.mT if _is_tall(matrix) else x for x, matrix in zip(done, matrices, strict=True)]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The iteration on one wide matrix or a stack of them."""
    a, b, c = coefficients
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    # The Frobenius norm bounds the largest singular value, which must not be above 1.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
