"""The decision of a step on an accelerator: one program of one launch, with all parameters in one vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_optim.core.fragment import NUMBER
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.decision import COLUMNS, HELPERS, Program, Results, Runner, body, stored
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.triton.functions import NAMED, jit, jit_text
from lightning_optim.kernels.triton.launch import current_device, launch

_SIZES = ("parameters", "tensors")


@jit
def total(x: Any) -> Any:
    """Return the sum."""
    return tl.sum(x, axis=0)


@jit
def every(x: Any) -> Any:
    """Return whether all elements hold."""
    return tl.min(x.to(tl.int32), axis=0) != 0


@jit
def some(x: Any) -> Any:
    """Return whether any element holds."""
    return tl.max(x.to(tl.int32), axis=0) != 0


@jit
def negation(x: Any) -> Any:
    """Return whether ``x`` does not hold."""
    return x == 0


@jit
def ones(x: Any) -> Any:
    """Return a vector of ones."""
    return tl.full(x.shape, 1.0, x.dtype)


@jit
def index(x: Any) -> Any:
    """Return the number of each element."""
    return tl.arange(0, x.shape[0])


@jit
def at(x: Any, i: Any) -> Any:
    """Return the element at ``i``."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == i, x, 0.0), axis=0)


@jit
def ordered(x: Any) -> Any:
    """Return the elements in ascending order."""
    return tl.sort(x)


@jit
def single(x: Any) -> Any:
    """Return ``x``, rounded to float32."""
    return x.to(tl.float32).to(tl.float64)


@jit
def exp(x: Any) -> Any:
    """Return the exponential."""
    return tl.exp(x)


@jit
def log(x: Any) -> Any:
    """Return the logarithm."""
    return tl.log(x)


@jit
def floor(x: Any) -> Any:
    """Return the largest whole number that is not above ``x``."""
    return tl.floor(x)


FUNCTIONS = {
    **NAMED,
    "at": at,
    "every": every,
    "exp": exp,
    "floor": floor,
    "index": index,
    "log": log,
    "negation": negation,
    "ones": ones,
    "ordered": ordered,
    "pick": NAMED["where"],
    "single": single,
    "some": some,
    "total": total,
}
"""The functions that a `Fragment` may call."""


def text(program: Program) -> str:
    """Return the text of the kernel."""
    pointers = program.arrays
    lines = [f"def kernel({', '.join(f'{name}_at' for name in pointers)}, {', '.join(_SIZES)}, SIZE: tl.constexpr):"]
    lines += ["lanes = tl.arange(0, SIZE)", "inside = lanes < parameters"]
    if program.sparse:
        lines += ["place = tl.load(place_at + lanes, mask=inside, other=-1)", "has = inside & (place >= 0)"]
    else:
        lines += ["place = lanes", "has = inside"]
    lines.append("norm_sq = tl.load(norm_sq_at + place, mask=has, other=0.0)")
    lines.append(
        "loss = tl.load(loss_at).to(tl.float64)" if program.has_loss else 'loss = tl.full([], float("nan"), tl.float64)'
    )
    if program.has_incoming:
        lines.append("incoming = tl.load(incoming_at).to(tl.float32)")
    lines += [f"{name} = tl.load(numbers_at + {i})" for i, name in enumerate(program.numbers)]
    lines += [f"{name} = tl.load({name}_at + lanes, mask=inside, other=1.0)" for name in program.vectors]
    for name, length in program.states:
        lines += _load(name, length)
    lines += ['infinity = float("inf")', *(line for line in body(program))]
    for name, length, new, part in stored(program):
        lines += _store(name, length, new, part)
    lines += [
        f"tl.store(new_counts_at + {i}, tl.load(counts_at + {i}) + {flag}.to(tl.int64))"
        for i, flag in enumerate(("clipped", "skip"))
    ]
    lines += ["tl.store(norm_at, norm)", "tl.store(skip_at, skip.to(tl.float32))"]
    lines.append(
        "tl.store(divisor_at + place, divisor, mask=has)" if program.per_tensor else "tl.store(divisor_at, divisor)"
    )
    if program.guard is not None:
        numbers = ("skip.to(tl.float64)", "norm", "loss", "norm_flag.to(tl.float64)", "loss_flag.to(tl.float64)")
        lines += [f"tl.store(row_at + {i}, {value})" for i, value in enumerate(numbers)]
        of_tensors = ["norm_sq", *(["lanes.to(tl.float64)"] if program.sparse else [])]
        of_tensors += ["own_ratio", "last_ratio"] if program.has_ratios else []
        lines += [
            f"tl.store(row_at + {COLUMNS} + {i} * tensors + place, {values}, mask=has)"
            for i, values in enumerate(of_tensors)
        ]
    return "\n".join([lines[0], *(f"    {line}" for line in lines[1:])]) + "\n"


def _load(name: str, length: int) -> Iterator[str]:
    if length == NUMBER:
        yield f"{name} = tl.load({name}_at).to(tl.float64)"
    elif length > NUMBER:
        yield f"slots_{name} = tl.arange(0, {triton.next_power_of_2(length)})"
        there = f'mask=slots_{name} < {length}, other=float("inf")'
        yield f"{name} = tl.load({name}_at + slots_{name}, {there}).to(tl.float64)"
    else:
        for i in range(-length):
            one = name if length == -1 else f"{name}_{i}"
            yield f"{one} = tl.load({name}_at + {i} * parameters + lanes, mask=inside, other=1.0).to(tl.float64)"


def _store(name: str, length: int, new: str, part: str) -> Iterator[str]:
    value = f"({new}).to(new_{name}_at.dtype.element_ty)"
    if length == NUMBER:
        yield f"tl.store(new_{name}_at, {value})"
    elif length > NUMBER:
        yield f"tl.store(new_{name}_at + slots_{name}, {value}, mask=slots_{name} < {length})"
    else:
        yield f"tl.store(new_{name}_at + {part} * parameters + lanes, {value}, mask=inside)"


@cache
def decision_kernel(program: Program) -> Any:
    """Return the kernel of a program."""
    helpers = {name: rebind(function, FUNCTIONS, jit) for name, function in HELPERS.items()}
    pointers = [f"{name}_at" for name in program.arrays]
    return jit_text(text(program), "kernel", {**FUNCTIONS, **helpers}, do_not_specialize=[*pointers, *_SIZES])


class DeviceRunner(Runner):
    """Runs programs on an accelerator, in one launch each.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def upload(self, values: np.ndarray) -> Tensor:
        """See `Runner`."""
        return upload(values, self._device)

    def run(self, program: Program, given: Mapping[str, Any], results: Results) -> dict[str, Tensor]:
        """See `Runner`."""
        device = self._device
        # The kernel knows no strides: averages of the first parameters are a part of those of all, for one.
        arrays = {
            name: (value if value.device == device else value.to(device, non_blocking=True)).contiguous()
            for name, value in given.items()
        }
        made = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in results.items()}
        arrays |= made
        tensors = arrays["norm_sq"].numel()
        parameters = arrays["place"].numel() if program.sparse else tensors
        size = max(triton.next_power_of_2(parameters), 16)
        with current_device(device):
            threads = min(max(size // 8, 128), 1024)
            ordered_arrays = map(arrays.__getitem__, program.arrays)
            launch(decision_kernel(program), 1, device, *ordered_arrays, parameters, tensors, size, threads=threads)
        return made
