"""Compiled measurements for clip rules: square sums of the rows of tensors, and Σ g²/v̂ of each tensor.

Each reads memory once and needs no temporary but its results; torch's operations would widen whole tensors to float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.kernels.compiled import DTYPES, split
from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu.launch import BlockLoop, kernel_text
from lightning_optim.kernels.cpu.memory import load, named_functions, sum_functions
from lightning_optim.kernels.cpu.source import CHUNK
from lightning_optim.kernels.cpu.threads import run_blocks

BLOCK = 65536
"""Number of elements of a block; a longer row is cut into parts, and shorter ones share a block."""

_ROW_TABLES = ("blocks", "widths", "addresses", "sums")
_ROWS = """\
tensor, top, bottom = blocks[block, 0], blocks[block, 1], blocks[block, 2]
low, high, place = blocks[block, 3], blocks[block, 4], blocks[block, 5]
width, address = widths[tensor, 0], addresses[tensor, 0]
for row in range(top, bottom):
    stop = row * width + high
    total = 0.0
    for chunk in range(row * width + low, stop, CHUNK):
        sum = zero
        for i in range(chunk, min(chunk + CHUNK, stop)):
            x = load_0(address, i)
            sum = add_product(sum, x, x)
        if sum - sum == zero:
            total += sum
        else:  # not finite, or squares beyond float32
            for i in range(chunk, min(chunk + CHUNK, stop)):
                wide_x = double(load_0(address, i))
                total = add_product(total, wide_x, wide_x)
    sums[place + row - top, 0] = total
"""

_RATIO_TABLES = ("blocks", "addresses", "scalars", "sums")
_RATIOS = """\
tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
grad, exp_avg_sq = addresses[tensor, 0], addresses[tensor, 1]
inverse_scale, old, new = scalars[tensor, 0], scalars[tensor, 1], scalars[tensor, 2]
floor, counts = scalars[tensor, 3], scalars[tensor, 4]
norm_sq, ratios = 0.0, 0.0
if counts != 0.0:
    for i in range(start, end):
        x = double(load_0(grad, i)) * inverse_scale
        norm_sq = add_product(norm_sq, x, x)
        ratios = add(ratios, 1.0 if absolute(x) > 0.0 else 0.0)
else:
    for i in range(start, end):
        x = double(load_0(grad, i)) * inverse_scale
        square = x * x
        norm_sq = add(norm_sq, square)
        ratios = add(ratios, square / maximum(old * double(load_1(exp_avg_sq, i)) + new * square, floor))
sums[block, 0] = norm_sq
sums[block, 1] = ratios
"""

RATIO_SCALARS = 5
"""Number of scalars of `ratios`: 1 / loss scale, the weights of the old second moment and of the new square in v̂,
the smallest v̂ to divide by, and whether every element with a gradient counts as 1."""


def row_squares(tensors: Sequence[Tensor], rows: Sequence[int]) -> npt.NDArray[np.float64]:
    """Compute the square sum of each row.

    Args:
        tensors: Tensors of one dtype, whose rows follow each other in memory, without gaps.
        rows: Number of rows of each.

    Returns:
        Shape [rows of all tensors].
    """
    widths = tuple(t.numel() // max(n, 1) for t, n in zip(tensors, rows, strict=True))
    blocks, starts, parts = _row_blocks(tuple(rows), widths)
    addresses = np.array([[tensor.data_ptr()] for tensor in tensors], dtype=np.int64)
    sums = np.zeros((parts, 1))
    kernel = _row_kernel(DTYPES[tensors[0].dtype])
    table = np.array([[width] for width in widths], dtype=np.int64)
    run_blocks(kernel, len(blocks), sum(map(Tensor.numel, tensors)), blocks, table, addresses, sums)
    return sums[:, 0] if len(starts) == parts else np.add.reduceat(sums[:, 0], starts)


def ratios(grads: Sequence[Tensor], moments: Sequence[Tensor], scalars: npt.NDArray[np.float64]) -> Tensor:
    """Compute Σ g² and Σ g²/v̂ of each tensor, in float64.

    Args:
        grads: Gradients of one dtype that is not float64, each of which fills one range of memory.
        moments: The second moment of each, of one dtype, with its strides; any tensor of that dtype and as many
            elements where the first step counts.
        scalars: [tensors, `RATIO_SCALARS`].

    Returns:
        Shape [tensors, 2], float64.
    """
    blocks = split(tuple(map(Tensor.numel, grads)), BLOCK)
    addresses = np.array([list(map(Tensor.data_ptr, tensors)) for tensors in (grads, moments)], dtype=np.int64)
    sums = np.zeros((len(blocks), 2))
    kernel = _ratio_kernel(DTYPES[grads[0].dtype], DTYPES[moments[0].dtype])
    elements = sum(map(Tensor.numel, grads))
    run_blocks(kernel, len(blocks), elements, blocks, np.ascontiguousarray(addresses.T), scalars, sums)
    totals = np.zeros((len(grads), 2))
    np.add.at(totals, blocks[:, 0], sums)
    return torch.from_numpy(totals)


@lru_cache(maxsize=64)
def _row_blocks(
    rows: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Cut rows into blocks: several rows each, or a part of one.

    Returns:
        Blocks, int64, [blocks, 6] of (tensor, first row, end, first column, end, place of the first sum); the place of
        the first sum of each row, int64, [rows]; and the number of sums.
    """
    blocks: list[tuple[int, ...]] = []
    starts = []
    place = 0
    for tensor, (count, width) in enumerate(zip(rows, widths, strict=True)):
        parts = max(1, -(-width // BLOCK))
        starts.append(np.arange(count, dtype=np.int64) * parts + place)
        if parts == 1:
            together = max(1, BLOCK // max(width, 1))
            firsts = range(0, count, together)
            blocks += [(tensor, row, min(row + together, count), 0, width, place + row) for row in firsts]
        else:
            blocks += [
                (tensor, row, row + 1, part * BLOCK, min((part + 1) * BLOCK, width), place + row * parts + part)
                for row in range(count)
                for part in range(parts)
            ]
        place += count * parts
    return np.array(blocks, dtype=np.int64).reshape(-1, 6), np.concatenate(starts), place


@cache
def _row_kernel(dtype: str) -> BlockLoop:
    wide = "float64" if dtype == "float64" else "float32"
    names: dict[str, Any] = {"load_0": load(dtype, 0, 1), "zero": np.dtype(wide).type(0)}
    tables = dict(zip(_ROW_TABLES, ("int64", "int64", "int64", "float64"), strict=True))
    return _compile("norms of rows", _ROWS, tables, names, (dtype,))


@cache
def _ratio_kernel(*dtypes: str) -> BlockLoop:
    named = named_functions("float64")
    names: dict[str, Any] = {f"load_{slot}": load(dtype, slot, 2) for slot, dtype in enumerate(dtypes)}
    names |= {"maximum": named["maximum"], "absolute": abs}
    tables = dict(zip(_RATIO_TABLES, ("int64", "int64", "float64", "float64"), strict=True))
    return _compile("gradients over second moments", _RATIOS, tables, names, dtypes)


def _compile(what: str, body: str, tables: dict[str, str], names: dict[str, Any], dtypes: tuple[str, ...]) -> BlockLoop:
    text = kernel_text(tuple(tables), (), body.splitlines())
    names |= {"__name__": __name__, "CHUNK": CHUNK, "double": numba.float64, **sum_functions(), **launch.names(tables)}
    kept_as = f"{what.replace(' ', '-')}-{disk_cache.fingerprint(f'{text}{dtypes}{CHUNK}', ())}"
    return launch.compile_loop(f"of {what} for {', '.join(dict.fromkeys(dtypes))}", text, names, kept_as)
