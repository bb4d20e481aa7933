"""Newton-Schulz iteration: the nearest (semi-)orthogonal matrix by matrix products, for many matrices at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_optim.kernels.symmetric import symmetric_products
from lightning_optim.optim.gram_form import gram_iterate, is_faster
from lightning_optim.optim.ns_coefficients import COEFFICIENTS, Coefficients, Triple, iterations

STACKED_BELOW = {"cpu": 192}
"""Smallest side from which matrices are iterated one after the other, by device. Below it, one batched product is
faster than many small ones: 0.24x of the time at 64 x 64, 0.5x at 128 x 128, and 1.1x to 1.2x at 192 and more, on one
core of an AMD EPYC with bfloat16 instructions."""

STACKED_BELOW_ELSEWHERE = 1024
"""The same on other devices, where launches dominate: stacks took 0.60x of the time at width 512 on an H100, and 1.15x
at 1024, where their copies cost more than the launches."""


def orthogonalize(
    matrices: Sequence[Tensor],
    coefficients: Coefficients = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool | None = None,
) -> list[Tensor]:
    """Approximate U·Vᵀ of each matrix U·S·Vᵀ by moving all singular values close to 1.

    Small matrices of one shape, or of its transpose, are stacked, because one batched product is faster than many. Tall
    matrices are transposed, because the wide form has the smaller Gram matrix.

    Args:
        matrices: Shape [rows, columns] or [matrices, rows, columns] each, on one device, of any floating dtype.
        coefficients: Name of a preset of `ns_coefficients.PRESETS`, (a, b, c), or a list of triples, one per iteration.
        steps: Number of iterations.
        eps: Smallest norm that a matrix is divided by.
        dtype: Dtype of the iteration.
        gram: Whether to iterate on the Gram matrix (`gram_form`); None where it is faster.

    Returns:
        Matrices in the shapes of ``matrices``, of dtype ``dtype``.

    Example:
        >>> (x,) = orthogonalize([torch.tensor([[3.0, 0.0], [0.0, 2.0]])], dtype=torch.float32)
        >>> bool((x.diagonal() > 0.6).all())
        True
    """
    stacks: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        *_, rows, columns = matrix.shape
        stacks.setdefault((min(rows, columns), max(rows, columns)), []).append(i)
    results: dict[int, Tensor] = {}
    schedule = iterations(coefficients, steps)
    for indices in stacks.values():
        done = orthogonalize_stack([matrices[i] for i in indices], schedule, eps, dtype, gram)
        results.update(zip(indices, done, strict=True))
    return [results[i] for i in range(len(matrices))]


def orthogonalize_stack(
    matrices: Iterable[Tensor],
    schedule: Sequence[Triple],
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool | None = None,
) -> list[Tensor]:
    """Orthogonalize matrices of one shape or its transpose, in one stack if they are small.

    Args:
        matrices: Shape [rows, columns] or [matrices, rows, columns] each; no reference is kept after conversion.
        schedule: Coefficients (a, b, c) of each iteration.
        eps: As for `orthogonalize`.
        dtype: As for `orthogonalize`.
        gram: As for `orthogonalize`.

    Returns:
        As for `orthogonalize`.
    """
    # The largest number of float16 is 65504, which the norm of a moderate matrix exceeds.
    first = torch.float32 if dtype is torch.float16 else dtype
    wide, tall = [], []
    for matrix in matrices:
        *_, rows, columns = matrix.shape
        tall.append(rows > columns)
        wide.append(matrix.to(first).mT if rows > columns else matrix.to(first))
    *_, rows, columns = wide[0].shape
    device = wide[0].device.type
    in_gram_form = is_faster(rows, columns, device) if gram is None else gram
    iterate = gram_iterate if in_gram_form else _iterate
    if rows >= STACKED_BELOW.get(device, STACKED_BELOW_ELSEWHERE):
        done = _one_by_one(wide, iterate, schedule, eps, dtype)
    else:
        done = _stacked(wide, iterate, schedule, eps, dtype)
    return [x.mT if was_tall else x for x, was_tall in zip(done, tall, strict=True)]


_Iterate = Callable[[Tensor, Sequence[Triple]], Tensor]


def _one_by_one(
    wide: list[Tensor], iterate: _Iterate, schedule: Sequence[Triple], eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """Iterate each matrix by itself; ``wide`` is emptied, so that only one input and its temporaries are alive."""
    done: list[Tensor] = []
    wide.reverse()
    while wide:
        x = wide.pop()
        if x.dim() == 2:
            done.append(iterate(_normalized(x, eps, dtype), schedule))
        elif len(x):
            done.append(torch.stack([iterate(_normalized(part, eps, dtype), schedule) for part in x]))
        else:
            done.append(x.to(dtype))
    return done


def _stacked(
    wide: list[Tensor], iterate: _Iterate, schedule: Sequence[Triple], eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """Iterate all matrices in one stack; ``wide`` is emptied."""
    if len(wide) == 1:
        return [iterate(_normalized(wide.pop(), eps, dtype), schedule)]
    single = [x.dim() == 2 for x in wide]
    stacks = [x[None] if alone else x for x, alone in zip(wide, single, strict=True)]
    counts = [len(stack) for stack in stacks]
    whole = [torch.cat(stacks)]
    wide.clear()
    stacks.clear()
    parts = iterate(_normalized(whole.pop(), eps, dtype), schedule).split_with_sizes(counts)
    return [part[0] if alone else part for part, alone in zip(parts, single, strict=True)]


def _normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Divide by the Frobenius norm, an upper bound of the largest singular value, which must be at most 1."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    # With eps=0 a matrix of zeros is divided by the smallest number instead, and stays zero.
    return (x / norm.clamp(min=max(eps, torch.finfo(x.dtype).tiny))).to(dtype)


def _iterate(x: Tensor, schedule: Sequence[Triple]) -> Tensor:
    """Run the iteration on a wide matrix, [rows, columns], or a stack, [matrices, rows, columns]."""
    symmetric = symmetric_products(x.device, x.dtype, x.shape[-2], x.dim() == 3)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in schedule:
        gram = symmetric.product(x, x.mT)
        gram = symmetric.add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, gram, x, beta=a)
    return x
