"""Newton-Schulz iteration on the Gram matrix, which is faster for matrices much wider than high, or higher than wide.

Each iteration multiplies x from the left by the polynomial Z = a·I + b·R + c·R² of its Gram matrix R = x·xᵀ, and all of
these polynomials commute (of a matrix higher than wide, from the right, with R = xᵀ·x). So the small matrix Q, the
product of all Z, can be computed from R alone, and x is multiplied once, by Q (Zhang, Amsel, Chen & Dao, 2026,
https://dao-lab.ai/blog/2026/gram-newton-schulz).

In 16 bits the Gram matrix that is computed by the recurrence drifts away from that of Q·x, and may get negative
eigenvalues, which each iteration makes larger. It is therefore restarted from x ← Q·x after every second iteration.
(The authors iterate in float16 and restart once, after the second of five. In bfloat16 that gave singular values of up
to 1.5 times those of the usual form, for `polar_express` and singular values that decay as k^-0.5; one restart after
the third gave 99 000 for k^-1. After every second it was 1.05 at most over ten spectra, three presets, and two sizes.)

A quintic that brings a singular value of 1 close to zero, as the first ones of `you` do, leaves of it in 16 bits little
but rounding: of a matrix of rank one, or of few rows, everything. It is restarted after each such quintic, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_optim.kernels.symmetric import symmetric_products
from lightning_optim.optim.ns_coefficients import Triple

RESTART_EVERY = 2
CANCELS_BELOW = 0.5
"""Value a + b + c, to which a quintic brings a singular value of 1, below which the Gram matrix is computed anew."""
SMALLEST = 2**14
"""Number of elements from which the Gram form is faster on CPUs, in stacks: it took 0.87x to 0.94x of the time of the
other form at 64 x 256, 0.94x to 1.0x at 64 x 192, 0.85x at 128 x 384, 0.95x at 256 x 512, 0.93x at 384 x 768, and 0.8x
at 256 x 1024 and 384 x 1536."""


def is_faster(rows: int, columns: int, device: str) -> bool:
    """Return whether the Gram form is faster for matrices of a shape.

    Of 15 products for five iterations, 10 have the size of x; the Gram form takes 11 small ones and 6 of that size:
    0.78 of the operations at an aspect ratio of 4, and 0.92 at 2, where small products are slower. On GPUs small
    matrices are bound by launches, which are not fewer.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        device: Type of the device.
    """
    small, large = sorted((rows, columns))
    if device == "cpu":
        # Of matrices of a few rows, the small products have few terms to average their rounding over.
        return 2 * large >= (4 if small >= 256 else 5) * small and small * large >= SMALLEST and small >= 32
    return large >= 2 * small and small >= 512


def gram_iterate(x: Tensor, schedule: Sequence[Triple]) -> Tensor:
    """Run the iteration.

    Args:
        x: Shape [rows, columns] or [matrices, rows, columns], with singular values of at most 1.
        schedule: Coefficients (a, b, c) of each iteration.

    Returns:
        Shape and dtype of ``x``.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    symmetric = symmetric_products(x.device, x.dtype, min(x.shape[-2:]), x.dim() == 3)
    add_product = symmetric.add_product  # Polynomials of one matrix commute, so their products are symmetric.
    gram = symmetric.product(x.mT, x) if is_tall else symmetric.product(x, x.mT)
    product: Tensor | None = None  # None stands for the identity matrix.
    done = 0  # iterations since the restart
    for i, (a, b, c) in enumerate(schedule):
        if product is not None and _restarts(schedule[i - 1], done):
            x = x @ product if is_tall else product @ x
            gram, product, done = symmetric.product(x.mT, x) if is_tall else symmetric.product(x, x.mT), None, 0
        done += 1
        rest = add_product(gram, gram, gram, beta=b, alpha=c)  # Z without a·I, which the sums below add
        if i + 1 < len(schedule) and not _restarts((a, b, c), done):
            half = add_product(gram, gram, rest, beta=a)
            gram = add_product(half, rest, half, beta=a)
        if product is None:
            product = rest
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            product = add_product(product, product, rest, beta=a)
    if product is None:
        return x
    return x @ product if is_tall else product @ x


def _restarts(last: Triple, done: int) -> bool:
    """Return whether the iteration restarts after a quintic, the ``done``-th since the last restart."""
    return done == RESTART_EVERY or abs(sum(last)) < CANCELS_BELOW
