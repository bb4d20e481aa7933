"""Newton-Schulz iteration: the nearest (semi-)orthogonal matrix by matrix products, for many matrices at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_optim.kernels.symmetric import symmetric_products
from lightning_optim.optim.gram_form import gram_iterate, is_faster
from lightning_optim.optim.ns_coefficients import COEFFICIENTS, Coefficients, Triple, iterations

AT_ONCE = 2**19
"""Number of elements that are iterated in one stack on CPUs at most. A product costs some 15 us before it begins, so
that more matrices at once are faster while they stay in the cache: on two cores of an AMD EPYC with bfloat16
instructions, stacks took 0.1x of the time of single matrices at 64 x 64, 0.15x at 64 x 256, and 0.5x at 128 x 512; in
a step, stacks of 0.5 to 4 MB differed by less than the noise, and one of 14 MB took 1.3x at 384 x 1536."""

ONE_BY_ONE_FROM = 1024
"""Smallest side from which matrices are iterated one after the other on other devices than the CPU, where launches
dominate: stacks took 0.60x of the time at width 512 on an H100, and 1.15x at 1024, where their copies cost more than
the launches."""


def orthogonalize(
    matrices: Sequence[Tensor],
    coefficients: Coefficients = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool | None = None,
) -> list[Tensor]:
    """Approximate U·Vᵀ of each matrix U·S·Vᵀ by moving all singular values close to 1.

    Matrices of one shape are stacked, because one batched product is faster than many.

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
    stacks: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        stacks.setdefault(tuple(matrix.shape[-2:]), []).append(i)
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
    """Orthogonalize matrices of one shape, in stacks where these are faster.

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
    given = [matrix.to(first) for matrix in matrices]
    if given[0].device.type != "cpu" and min(given[0].shape[-2:]) >= ONE_BY_ONE_FROM:
        return _one_by_one(given, schedule, eps, dtype, gram)
    single = [x.dim() == 2 for x in given]
    stacks = [x[None] if alone else x for x, alone in zip(given, single, strict=True)]
    given.clear()
    counts = [len(stack) for stack in stacks]
    whole = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
    stacks.clear()
    done = orthogonalize_in_parts(whole, schedule, eps, dtype, gram)
    parts = (done[0] if len(done) == 1 else torch.cat(done)).split_with_sizes(counts)
    return [part[0] if alone else part for part, alone in zip(parts, single, strict=True)]


def orthogonalize_in_parts(
    stack: Tensor, schedule: Sequence[Triple], eps: float, dtype: torch.dtype, gram: bool | None = None
) -> list[Tensor]:
    """Orthogonalize a stack, as many of its matrices at once as suits the device.

    Args:
        stack: Shape [matrices, rows, columns].
        schedule: As for `orthogonalize_stack`.
        eps: As for `orthogonalize`.
        dtype: As for `orthogonalize`.
        gram: As for `orthogonalize`.

    Returns:
        Consecutive parts of the result, [some, rows, columns] each, contiguous.
    """
    if stack.device.type != "cpu":
        return [_iterated(stack, schedule, eps, dtype, gram)]
    count = max(1, AT_ONCE // max(stack.shape[1:].numel(), 1))
    # Products of a stack of one take up to 1.5 times as long as those of a matrix.
    return [
        _iterated(part[0], schedule, eps, dtype, gram)[None]
        if len(part) == 1
        else _iterated(part, schedule, eps, dtype, gram)
        for part in torch.split(stack, count)
    ]


def _one_by_one(
    given: list[Tensor], schedule: Sequence[Triple], eps: float, dtype: torch.dtype, gram: bool | None
) -> list[Tensor]:
    """Iterate each matrix by itself; ``given`` is emptied, so that only one input and its temporaries are alive."""
    done: list[Tensor] = []
    given.reverse()
    while given:
        x = given.pop()
        if x.dim() == 2:
            done.append(_iterated(x, schedule, eps, dtype, gram))
        elif len(x):
            done.append(torch.stack([_iterated(part, schedule, eps, dtype, gram) for part in x]))
        else:
            done.append(x.to(dtype))
    return done


def _iterated(x: Tensor, schedule: Sequence[Triple], eps: float, dtype: torch.dtype, gram: bool | None) -> Tensor:
    """Divide by the Frobenius norm, an upper bound of the largest singular value, which must be at most 1; iterate."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    # With eps=0 a matrix of zeros is divided by the smallest number instead, and stays zero.
    x = (x / norm.clamp(min=max(eps, torch.finfo(x.dtype).tiny))).to(dtype)
    if gram is None:
        gram = is_faster(x.shape[-2], x.shape[-1], x.device.type)
    return gram_iterate(x, schedule) if gram else iterate(x, schedule)


def iterate(x: Tensor, schedule: Sequence[Triple]) -> Tensor:
    """Run the iteration as published, with the smaller of the two Gram matrices.

    Args:
        x: Shape [rows, columns] or [matrices, rows, columns], with singular values of at most 1.
        schedule: Coefficients (a, b, c) of each iteration.

    Returns:
        Shape and dtype of ``x``.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    symmetric = symmetric_products(x.device, x.dtype, min(x.shape[-2:]), x.dim() == 3)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in schedule:
        gram = symmetric.product(x.mT, x) if is_tall else symmetric.product(x, x.mT)
        gram = symmetric.add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, x, gram, beta=a) if is_tall else add_product(x, gram, x, beta=a)
    return x
