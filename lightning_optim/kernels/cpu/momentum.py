"""Compiled loops around products of matrices: the momentum into a stack before them, and the whole update after them.

torch needs about fifteen passes over memory where these need two. The first reads gradient and momentum, and stores
what is orthogonalised; the second computes the new momentum again, which takes less time than to keep it, and stores it
together with the new weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_optim.kernels.compiled import DTYPES
from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu.launch import BlockLoop, kernel_text
from lightning_optim.kernels.cpu.memory import WITHIN_KERNELS, compiled, load, named_functions, store
from lightning_optim.kernels.cpu.threads import run_blocks
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.weight_decay import APPLY_DECAY

BLOCK = 16384
"""Approximate number of elements per block, which is some rows of a matrix."""

_STACK = """\
matrix, top, bottom = blocks[block, 0], blocks[block, 1], blocks[block, 2]
columns, stride, apart = sizes[matrix, 0], sizes[matrix, 1], sizes[matrix, 2]
grad, momentum, result = addresses[matrix, 0], addresses[matrix, 1], addresses[matrix, 2]
inverse_divisor, weight, momentum_weight = scalars[matrix, 0], scalars[matrix, 1], scalars[matrix, 2]
for row in range(top, bottom):
    for i in range(columns):
        g = load_0(grad, row * stride + i) * inverse_divisor
        m = lerp(load_1(momentum, row * stride + i), g, weight)
        store_2(result, row * apart + i, lerp(g, m, momentum_weight) if NESTEROV else m)
"""

_UPDATE = """\
matrix, top, bottom = blocks[block, 0], blocks[block, 1], blocks[block, 2]
columns, stride, apart = sizes[matrix, 0], sizes[matrix, 1], sizes[matrix, 2]
grad, momentum, direction = addresses[matrix, 0], addresses[matrix, 1], addresses[matrix, 2]
param = addresses[matrix, 3]
inverse_divisor, weight = scalars[matrix, 0], scalars[matrix, 1]
step, decay = scalars[matrix, 2], scalars[matrix, 3]
for row in range(top, bottom):
    for i in range(columns):
        g = load_0(grad, row * stride + i) * inverse_divisor
        store_1(momentum, row * stride + i, lerp(load_1(momentum, row * stride + i), g, weight))
        x = load_3(param, row * stride + i)
        store_3(param, row * stride + i, x - change(x, load_2(direction, row * apart + i) * step, decay))
"""

_SCALAR_STEP = "step, decay = scalars[matrix, 2], scalars[matrix, 3]\nfor row in range(top, bottom):\n"
_ROW_STEPS = "steps, decay = addresses[matrix, 4], scalars[matrix, 3]\nfor row in range(top, bottom):\n"
_UPDATE_ROWS = _UPDATE.replace(_SCALAR_STEP, f"{_ROW_STEPS}    step = load_4(steps, row)\n")

_TABLES = ("blocks", "sizes", "addresses", "scalars")
_KERNELS = {"stack": _STACK.replace("NESTEROV", "False"), "nesterov_stack": _STACK.replace("NESTEROV", "True")}
_KERNELS |= {"update": _UPDATE, "update_rows": _UPDATE_ROWS}


class Place(NamedTuple):
    """Where matrices of one shape lie in a contiguous tensor.

    Args:
        first: Index of the first element of the first one.
        matrices: Number of matrices.
        apart: Elements from one to the next.
        rows: Rows of each.
        columns: Columns of each; the elements of a row follow each other.
        stride: Elements from one row to the next.
    """

    first: int
    matrices: int
    apart: int
    rows: int
    columns: int
    stride: int


def stack(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    places: Sequence[Place],
    scalars: npt.NDArray[np.float32],
    *,
    nesterov: bool,
) -> Tensor:
    """Compute what is orthogonalised: the new momentum, or with ``nesterov`` the gradient moved towards it.

    Args:
        grads: Contiguous gradients.
        momenta: Contiguous momenta in the shapes of ``grads``, which are read only.
        places: Where the matrices of each tensor are, all of one shape.
        scalars: Factor of the gradient, its weight in the momentum, and the weight of the momentum, [tensors, 3].
        nesterov: Whether to use Nesterov's momentum.

    Returns:
        Shape [matrices, rows, columns], bfloat16.
    """
    _, _, _, rows, columns, _ = places[0]
    result = torch.empty(sum(place.matrices for place in places), rows, columns, dtype=torch.bfloat16, device="cpu")
    _run("nesterov_stack" if nesterov else "stack", (grads, momenta), [result], places, scalars)
    return result


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    directions: Sequence[Tensor],
    places: Sequence[Place],
    scalars: npt.NDArray[np.float32],
    steps: Tensor | None = None,
    *,
    like_params: bool = False,
) -> None:
    """Store the new momenta, and subtract the orthogonal matrices and the weight decay from the parameters.

    Args:
        params: Contiguous parameters, written in place.
        grads: As for `stack`.
        momenta: As for `stack`, written in place.
        directions: Consecutive parts of a stack of orthogonal matrices, [some, rows, columns] each, bfloat16,
            contiguous; with ``like_params`` tensors in the shapes of ``params``, in which these lie at the same places.
        places: As for `stack`.
        scalars: Factor of the gradient, its weight in the momentum, the factor of the orthogonal matrix, and the
            fraction of the parameter that is subtracted, [tensors, 4].
        steps: Factor of each row of the orthogonal matrices, [matrices, rows], float32, contiguous, in the place of the
            one of ``scalars``.
        like_params: How ``directions`` are given.
    """
    name = "update" if steps is None else "update_rows"
    _run(name, (grads, momenta), directions, places, scalars, params, steps, like_params)


def _run(
    name: str,
    inputs: Sequence[Sequence[Tensor]],
    stacks: Sequence[Tensor],
    places: Sequence[Place],
    scalars: npt.NDArray[np.float32],
    params: Sequence[Tensor] = (),
    steps: Tensor | None = None,
    like_params: bool = False,
) -> None:
    """Run kernel ``name``; its slots are ``inputs``, the matrices of ``stacks``, ``params``, and rows of ``steps``."""
    blocks, sizes, tensors, offsets = _tables(tuple(places), like_params)
    slots = [*inputs, params] if params else list(inputs)
    columns = []
    for slot in slots:
        starts = np.array([tensor.data_ptr() for tensor in slot], dtype=np.int64)
        columns.append(starts[tensors] + offsets * slot[0].element_size())
    size = stacks[0].element_size()
    if like_params:
        starts = np.array([tensor.data_ptr() for tensor in stacks], dtype=np.int64)[tensors] + offsets * size
    else:
        each = places[0].rows * places[0].columns * size
        starts = np.concatenate([part.data_ptr() + each * np.arange(len(part)) for part in stacks])
    columns.insert(2, starts)
    dtypes = [slot[0].dtype for slot in (*inputs, stacks, *([params] if params else []))]
    if steps is not None:
        columns.append(steps.data_ptr() + steps.element_size() * steps.shape[1] * np.arange(len(steps)))
        dtypes.append(steps.dtype)
    kernel = _build(name, tuple(map(DTYPES.__getitem__, dtypes)))
    elements = len(tensors) * places[0].rows * places[0].columns
    run_blocks(kernel, len(blocks), elements, blocks, sizes, np.stack(columns, 1), scalars[tensors])


@lru_cache(maxsize=256)
def _tables(places: tuple[Place, ...], like_params: bool) -> tuple[npt.NDArray[np.int64], ...]:
    """Cut matrices into blocks of rows.

    Returns:
        Blocks, int64, [blocks, 3] of (matrix, first row, end); sizes, [matrices, 3] of columns, of the elements from
        one row to the next, and of these in the stack; and of each matrix the index of its tensor and its first
        element, [matrices].
    """
    rows, columns = places[0].rows, places[0].columns
    height = max(1, BLOCK // max(columns, 1))
    matrices = [(i, place.first + k * place.apart) for i, place in enumerate(places) for k in range(place.matrices)]
    tops = range(0, rows if columns else 0, height)
    blocks = [(matrix, top, min(top + height, rows)) for matrix in range(len(matrices)) for top in tops]
    sizes = [(columns, places[i].stride, places[i].stride if like_params else columns) for i, _ in matrices]
    return tuple(np.array(table, dtype=np.int64) for table in (blocks, sizes, *zip(*matrices, strict=True)))


def _lerp(start: Any, end: Any, weight: Any) -> Any:
    # As torch's `lerp`, whose result is exact at both ends.
    difference = end - start
    if weight < HALF:
        return start + weight * difference
    return end + (weight - ONE) * difference


HALF, ONE = np.float32(0.5), np.float32(1)


@cache
def _build(name: str, dtypes: tuple[str, ...]) -> BlockLoop:
    text = kernel_text(_TABLES, (), _KERNELS[name].splitlines())
    names: dict[str, Any] = {
        "__name__": __name__,
        # One rounding where the processor has fused multiply-adds, as in torch.
        "lerp": numba.njit(_lerp, error_model="numpy", fastmath={"contract"}, **WITHIN_KERNELS),
        "change": rebind(APPLY_DECAY["shrink"], named_functions("float32"), compiled),
    }
    for slot, dtype in enumerate(dtypes):
        names[f"load_{slot}"] = load(dtype, slot, len(dtypes))
        names[f"store_{slot}"] = store(dtype, slot, len(dtypes))
    names |= launch.names(dict(zip(_TABLES, ("int64", "int64", "int64", "float32"), strict=True)))
    fingerprint = disk_cache.fingerprint(f"{text}{dtypes}", (APPLY_DECAY["shrink"], _lerp))
    what = f"of momentum ({name}) for {', '.join(dict.fromkeys(dtypes))}"
    return launch.compile_loop(what, text, names, f"{name}-{fingerprint}")
