"""Compiled loops for second moments stored as row and column factors, as in Adafactor.

torch needs about fifteen passes over memory where these loops need three: one read of the gradients for the mean
squares of rows and columns, a second for the size of the update, and a third for the update itself. Each loop runs over
all tensors at once.

Tensors are treated as ``matrices`` × ``rows`` × ``columns``; the last two dimensions are the factored ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.kernels.base import largest
from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu.launch import BlockLoop, kernel_text
from lightning_optim.kernels.cpu.memory import compiled, load, named_functions, store, sum_functions
from lightning_optim.kernels.cpu.threads import run_blocks
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.weight_decay import APPLY_DECAY

BLOCK = 65536
"""Approximate number of elements per block, which has at least 16 rows, so that column sums need little memory."""

CHUNK = 4096
"""Number of elements of a row summed in the arithmetic dtype before their sum is added to a float64 total."""

Shape = tuple[int, int, int]

_MEAN_SQUARES = """\
tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
top, bottom, part = blocks[block, 3], blocks[block, 4], blocks[block, 5]
rows, columns, parts = shapes[tensor, 1], shapes[tensor, 2], shapes[tensor, 3]
grad, row_means, column_means = addresses[tensor, 0], addresses[tensor, 1], addresses[tensor, 2]
inverse_divisor = scalars[tensor, 0]
for matrix in range(start, end):
    column, exact = (matrix * parts + part) * columns, False
    for i in range(columns):
        store_2(column_means, column + i, zero)
    for row in range(matrix * rows + top, matrix * rows + bottom):
        total = 0.0
        for chunk in range(0, columns, CHUNK):
            row_sum = zero
            for i in range(chunk, min(chunk + CHUNK, columns)):
                x = load_0(grad, row * columns + i) * inverse_divisor
                store_2(column_means, column + i, add_product(load_2(column_means, column + i), x, x))
                row_sum = add_product(row_sum, x, x)
            total += row_sum
        if total - total != 0.0:  # not finite, or squares beyond float32
            total, exact = 0.0, True
            for i in range(columns):
                wide_x = double(load_0(grad, row * columns + i) * inverse_divisor)
                total += wide_x * wide_x
        store_1(row_means, row, float(minimum(total / columns, LARGEST)))
    for i in range(columns):
        store_2(column_means, column + i, load_2(column_means, column + i) / float(rows))
    if exact:
        for i in range(columns):
            total = 0.0
            for row in range(matrix * rows + top, matrix * rows + bottom):
                wide_x = double(load_0(grad, row * columns + i) * inverse_divisor)
                total += wide_x * wide_x
            store_2(column_means, column + i, float(minimum(total / rows, LARGEST)))
"""

_SCALED_SQUARES = """\
tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
top, bottom, part = blocks[block, 3], blocks[block, 4], blocks[block, 5]
rows, columns = shapes[tensor, 1], shapes[tensor, 2]
grad, row_factors, column_factors = addresses[tensor, 0], addresses[tensor, 1], addresses[tensor, 2]
inverse_divisor, ceiling = scalars[tensor, 0], scalars[tensor, 1]
total = 0.0
for matrix in range(start, end):
    for row in range(matrix * rows + top, matrix * rows + bottom):
        factor = load_1(row_factors, row)
        for chunk in range(0, columns, CHUNK):
            row_sum = zero
            for i in range(chunk, min(chunk + CHUNK, columns)):
                y = minimum(factor * load_2(column_factors, matrix * columns + i), ceiling)
                y *= load_0(grad, row * columns + i) * inverse_divisor
                row_sum = add_product(row_sum, y, y)
            total += row_sum
sums[block, 0] = total
"""

_SCALED = """\
tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
top, bottom, part = blocks[block, 3], blocks[block, 4], blocks[block, 5]
rows, columns = shapes[tensor, 1], shapes[tensor, 2]
grad, row_factors, column_factors = addresses[tensor, 0], addresses[tensor, 1], addresses[tensor, 2]
result = addresses[tensor, 3]
inverse_divisor, ceiling = scalars[tensor, 0], scalars[tensor, 1]
scale, decay = scalars[tensor, 2], scalars[tensor, 3]
for matrix in range(start, end):
    for row in range(matrix * rows + top, matrix * rows + bottom):
        factor = load_1(row_factors, row)
        for i in range(columns):
            y = minimum(factor * load_2(column_factors, matrix * columns + i), ceiling)
            y = scale * (load_0(grad, row * columns + i) * inverse_divisor * y)
            RESULT
"""
_SCALED_DELTAS = _SCALED.replace("RESULT", "store_3(result, row * columns + i, y)")
_SUBTRACTED = _SCALED.replace(
    "RESULT",
    "x = load_3(result, row * columns + i)\n            store_3(result, row * columns + i, x - change(x, y, decay))",
)

_TABLES = ("blocks", "shapes", "addresses", "scalars", "sums")

_KERNELS = {
    "mean_squares": _MEAN_SQUARES,
    "scaled_squares": _SCALED_SQUARES,
    "scaled": _SCALED_DELTAS,
    "subtracted": _SUBTRACTED,
}


def mean_squares(grads: Sequence[Tensor], inverse_divisors: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the means of g² over columns and over rows.

    Args:
        grads: Contiguous gradients of one dtype, [..., rows, columns] each.
        inverse_divisors: Factor of each gradient, with which it is g.

    Returns:
        Means over the last dimension, [..., rows, 1] each, and over the second to last, [..., 1, columns] each, in the
        dtype of the gradients. Larger means are clamped to `largest`, the largest value that the state can hold.
    """
    blocks, shapes = _blocks(tuple(_shape(grad) for grad in grads))
    row_means = [grad.new_empty(*grad.shape[:-1], 1) for grad in grads]
    parts = shapes[:, 3].tolist()
    column_means = [g.new_empty(*g.shape[:-2], part, g.shape[-1]) for g, part in zip(grads, parts, strict=True)]
    _run("mean_squares", blocks, shapes, (grads, row_means, column_means), _table(grads, inverse_divisors))
    most = largest(grads[0].dtype)
    column_means = [m if m.shape[-2] == 1 else m.sum(-2, keepdim=True).clamp_(max=most) for m in column_means]
    return row_means, column_means


def scaled_squares(
    grads: Sequence[Tensor],
    inverse_divisors: Sequence[float],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    ceilings: Sequence[float],
) -> Tensor:
    """Compute Σ (g·min(row·column, ceiling))² of each tensor.

    Args:
        grads: As for `mean_squares`.
        inverse_divisors: As for `mean_squares`.
        rows: Row factors, [..., rows, 1] each.
        columns: Column factors, [..., 1, columns] each.
        ceilings: Upper bound of the product of factors for each tensor.

    Returns:
        Shape [tensors], float64.
    """
    blocks, shapes = _blocks(tuple(_shape(grad) for grad in grads))
    scalars = _table(grads, inverse_divisors, ceilings)
    sums = _run("scaled_squares", blocks, shapes, (grads, rows, columns), scalars)
    totals = np.zeros(len(grads))
    np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)


class Scaled:
    """The updates scale·g·min(row·column, ceiling), which are computed one by one or subtracted without being stored.

    Args:
        shapes: Shapes of the updates.
        grads: As for `mean_squares`.
        inverse_divisors: As for `mean_squares`.
        rows: As for `scaled_squares`.
        columns: As for `scaled_squares`.
        ceilings: As for `scaled_squares`.
        scales: Factor of each update.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        grads: Sequence[Tensor],
        inverse_divisors: Sequence[float],
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        ceilings: Sequence[float],
        scales: Sequence[float],
    ) -> None:
        self._shapes = shapes
        self._factors = (grads, rows, columns)
        self._scalars = _table(grads, inverse_divisors, ceilings, scales, [0.0] * len(grads))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._delta, range(len(self._shapes)))  # A loop would keep one update while it makes the next.

    def _delta(self, i: int) -> Tensor:
        grad, rows, columns = (factor[i : i + 1] for factor in self._factors)
        delta = torch.empty_like(grad[0])
        _run("scaled", *_blocks((_shape(delta),)), (grad, rows, columns, [delta]), self._scalars[i : i + 1])
        return delta.view(self._shapes[i])

    def subtract_from(self, params: Sequence[Tensor], decay: Tensor) -> None:
        """Subtract all updates and the weight decay from parameters in one pass.

        Args:
            params: Contiguous parameters in the dtype of the gradients, written in place.
            decay: Fraction of each parameter that is subtracted as well, [tensors].
        """
        blocks, shapes = _blocks(tuple(_shape(grad) for grad in self._factors[0]))
        scalars = self._scalars.copy()
        scalars[:, 3] = decay.numpy()
        _run("subtracted", blocks, shapes, (*self._factors, params), scalars)


def _shape(grad: Tensor) -> Shape:
    rows, columns = grad.shape[-2:]
    return grad.shape[:-2].numel(), rows, columns


def _numpy(tensors: Sequence[Tensor]) -> Any:
    return np.float64 if tensors[0].dtype == torch.float64 else np.float32


def _table(tensors: Sequence[Tensor], *columns: Sequence[float]) -> npt.NDArray[Any]:
    """Return the scalars of each tensor, [tensors, columns], in the dtype of the arithmetic."""
    return np.array(columns, dtype=_numpy(tensors)).T.copy()


@lru_cache(maxsize=64)
def _blocks(shapes: tuple[Shape, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split tensors into blocks of rows of one matrix, or of several whole matrices where these are small.

    Returns:
        Blocks, int64, [blocks, 6] of (tensor, first matrix, end, first row, end, index of the block in its matrix); and
        shapes, int64, [tensors, 4] of (matrices, rows, columns, blocks per matrix).
    """
    blocks: list[tuple[int, ...]] = []
    parts = []
    for tensor, (matrices, rows, columns) in enumerate(shapes):
        height = max(16, BLOCK // max(columns, 1))
        parts.append(max(1, -(-rows // height)))
        if rows > height:
            for matrix in range(matrices):
                tops = range(0, rows, height)
                blocks += [(tensor, matrix, matrix + 1, t, min(t + height, rows), t // height) for t in tops]
        else:
            count = max(1, BLOCK // max(rows * columns, 1))
            starts = range(0, matrices, count)
            blocks += [(tensor, start, min(start + count, matrices), 0, rows, 0) for start in starts]
    with_parts = [(*shape, part) for shape, part in zip(shapes, parts, strict=True)]
    return np.array(blocks, dtype=np.int64).reshape(-1, 6), np.array(with_parts, dtype=np.int64)


def _run(
    name: str,
    blocks: npt.NDArray[np.int64],
    shapes: npt.NDArray[np.int64],
    slots: Sequence[Sequence[Tensor]],
    scalars: npt.NDArray[Any],
) -> npt.NDArray[np.float64]:
    """Run kernel ``name`` over all blocks of the contiguous tensors ``slots``; return its sums, float64, [blocks]."""
    kernel = _build(name, "float64" if slots[0][0].dtype == torch.float64 else "float32", len(slots))
    addresses = np.array([[tensor.data_ptr() for tensor in slot] for slot in slots], dtype=np.int64).T.copy()
    sums = np.zeros((len(blocks), 1))
    run_blocks(kernel, len(blocks), sum(map(Tensor.numel, slots[0])), blocks, shapes, addresses, scalars, sums)
    return sums[:, 0]


@cache
def _build(name: str, dtype: str, slots: int) -> BlockLoop:
    text = kernel_text(_TABLES, (), _KERNELS[name].splitlines())
    named = named_functions(dtype)
    names: dict[str, Any] = {
        "__name__": __name__,
        "CHUNK": CHUNK,
        "zero": np.dtype(dtype).type(0),
        "LARGEST": largest(getattr(torch, dtype)),
        "float": getattr(numba, dtype),
        "double": numba.float64,
        "minimum": named["minimum"],
        "change": rebind(APPLY_DECAY["shrink"], named, compiled),
    } | sum_functions()
    for slot in range(slots):
        names[f"load_{slot}"] = load(dtype, slot, slots)
        names[f"store_{slot}"] = store(dtype, slot, slots)
    names |= launch.names(dict(zip(_TABLES, ("int64", "int64", "int64", dtype, "float64"), strict=True)))
    fingerprint = disk_cache.fingerprint(f"{text}{dtype}{slots}{CHUNK}{names['LARGEST']}", (APPLY_DECAY["shrink"],))
    return launch.compile_loop(f"{name} for {dtype}", text, names, f"{name}-{fingerprint}")
