"""Newton-Schulz iteration: the nearest (semi-)orthogonal matrix by matrix products, for many matrices at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic a·x + b·x³ + c·x⁵, which Jordan et al. chose so that small singular values grow fast.
Singular values do not converge to 1 but are between about 0.7 and 1.2 after five steps, which works as well."""


def orthogonalize(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Approximate U·Vᵀ of each matrix U·S·Vᵀ by moving all singular values close to 1.

    Matrices of one shape, or of its transpose, are stacked, because one batched product is faster than many small ones
    on GPUs and CPUs. Tall matrices are transposed, because the wide form has the smaller Gram matrix.

    Args:
        matrices: Shape [rows, columns] each, on one device, of any floating dtype.
        coefficients: (a, b, c) of the quintic.
        steps: Number of iterations.
        eps: Smallest norm that a matrix is divided by.
        dtype: Dtype of the iteration.

    Returns:
        Matrices in the shapes of ``matrices``, of dtype ``dtype``.

    Example:
        >>> (x,) = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])], dtype=torch.float32)
        >>> bool((x.diagonal() > 0.6).all())
        True
    """
    stacks: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        stacks.setdefault((min(matrix.shape), max(matrix.shape)), []).append(i)
    results: dict[int, Tensor] = {}
    for indices in stacks.values():
        done = orthogonalize_stack([matrices[i] for i in indices], coefficients, steps, eps, dtype)
        results.update(zip(indices, done, strict=True))
    return [results[i] for i in range(len(matrices))]


def orthogonalize_stack(
    matrices: Iterable[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Orthogonalize matrices of one shape or its transpose in one stack.

    Args:
        matrices: Shape [rows, columns] or [matrices, rows, columns] each; no reference is kept after conversion.
        coefficients: As for `orthogonalize`.
        steps: As for `orthogonalize`.
        eps: As for `orthogonalize`.
        dtype: As for `orthogonalize`.

    Returns:
        As for `orthogonalize`.
    """
    wide = [matrix.to(dtype) for matrix in matrices]
    tall = [matrix.shape[-2] > matrix.shape[-1] for matrix in wide]
    wide = [matrix.mT if is_tall else matrix for matrix, is_tall in zip(wide, tall, strict=True)]
    if len(wide) == 1:
        done = [_iterate(wide.pop(), coefficients, steps, eps)]
    else:
        counts = [x.shape[0] if x.dim() == 3 else 0 for x in wide]
        whole = [torch.cat([x if count else x[None] for x, count in zip(wide, counts, strict=True)])]
        wide.clear()
        parts = _iterate(whole.pop(), coefficients, steps, eps).split_with_sizes([count or 1 for count in counts])
        done = [part if count else part[0] for part, count in zip(parts, counts, strict=True)]
    return [x.mT if was_tall else x for x, was_tall in zip(done, tall, strict=True)]


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Run the iteration on a wide matrix, [rows, columns], or a stack, [matrices, rows, columns]."""
    a, b, c = coefficients
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    # The largest singular value must be at most 1, and the Frobenius norm is an upper bound of it.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, gram, x, beta=a)
    return x
