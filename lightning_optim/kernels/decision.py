"""The decision of a step in one launch: the clip rule's part and the guard's as one program over all parameters.

The program is generated as text from the `Fragment` of each. This file has the text, and the functions by which numpy
runs it on the CPU; `triton/decision.py` compiles it for an accelerator, where it is one program of one launch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.core.fragment import NUMBER, Fragment
from lightning_optim.kernels.rules import rebind

COLUMNS = 5
"""Number of columns before the square sums in a row: whether the step is skipped, norm, loss, and a flag for each."""
MOST = 8192
"""Largest number of parameters of a compiled program, which holds a vector in the registers of one block."""
LONGEST = 1024
"""Length of the longest window of a compiled program, which sorts it in registers: AutoClip took 1.8 s to compile with
1024 norms, and 11 s with 4096."""


@dataclass(frozen=True)
class Program:
    """A decision, of which the text is generated and compiled once.

    Args:
        clip: The part of the clip rule; None without clipping.
        per_tensor: Whether its divisor is a vector.
        guard: The part of the guard; None for no skip but an incoming one, and that of a gradient that is not finite.
        has_ratios: Whether the guard's part binds the vectors ``own_ratio`` and ``last_ratio`` for the row.
        has_loss: Whether the loss is known.
        has_incoming: Whether something else may ask for a skip: a GradScaler's overflow flag.
        can_skip: Whether a gradient that is not finite skips the step.
        sparse: Whether some parameters have no gradient.
    """

    clip: Fragment | None
    per_tensor: bool
    guard: Fragment | None
    has_ratios: bool
    has_loss: bool
    has_incoming: bool
    can_skip: bool
    sparse: bool

    @cached_property
    def parts(self) -> tuple[Fragment, ...]:
        """Both parts, as far as there are any."""
        return tuple(part for part in (self.clip, self.guard) if part is not None)

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """Names of all numbers from the host."""
        return tuple(name for part in self.parts for name in part.numbers)

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """Names of all vectors from the host."""
        return tuple(name for part in self.parts for name in part.vectors)

    @cached_property
    def states(self) -> tuple[tuple[str, int], ...]:
        """Names and lengths of all states."""
        return tuple(state for part in self.parts for state in part.states)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of the arrays that the program reads, in order."""
        given = {"place": self.sparse, "loss": self.has_loss, "incoming": self.has_incoming, "numbers": self.numbers}
        return (
            "norm_sq",
            *(name for name, there in given.items() if there),
            *self.vectors,
            *dict(self.states),
            "counts",
        )

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the arrays that the program writes, in order."""
        row = () if self.guard is None else ("row",)
        return (*(f"new_{name}" for name in dict(self.states)), "new_counts", "divisor", "norm", "skip", *row)

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays, in the order of the arguments."""
        return (*self.reads, *self.writes)

    def row_length(self, tensors: int) -> int:
        """Return the number of columns of a row, for that many gradients."""
        return COLUMNS + tensors * (1 + self.sparse + 2 * self.has_ratios)


def body(program: Program) -> Iterator[str]:
    """Yield the lines between the reading of the arrays and the writing of the results, the same for all backends."""
    yield "norm = sqrt(total(norm_sq))"
    yield "finite = every(norm_sq * 0.0 == 0.0)"
    if program.clip is None:
        yield "divisor, clipped = 1.0, norm < 0.0"
    else:
        yield from program.clip.lines
    if program.guard is None:
        yield "skip = negation(finite)" if program.can_skip else "skip = norm < 0.0"
    else:
        yield from program.guard.lines
    if program.has_incoming:
        yield "skip = skip | (incoming != 0.0)"
    yield "taken = negation(skip)"
    yield "accepted = taken & finite"
    yield "clipped = clipped & accepted"


def stored(program: Program) -> Iterator[tuple[str, int, str, str]]:
    """Yield for each state its name, its length, the expression of its next value, and the vector that it is in."""
    for part in program.parts:
        accepts = "accepted" if part is program.clip else "taken"
        for name, length in part.states:
            if length >= NUMBER:
                new = (
                    f"pick({accepts}, new_{name}, {name})"
                    if length == NUMBER
                    else f"where({accepts}, new_{name}, {name})"
                )
                yield name, length, f"new_{name}" if name in part.always else new, ""
                continue
            for i in range(-length):
                one = name if length == -1 else f"{name}_{i}"
                yield name, length, f"where(has & {accepts}, new_{one}, {one})", str(i)


def numpy_text(program: Program) -> str:
    """Return the text of the program over numpy arrays."""
    lines = [f"def decide({', '.join(f'{name}_at' for name in program.arrays)}):"]
    lines.append("norm_sq = norm_sq_at")
    if program.sparse:
        lines += ["has = place_at >= 0", "norm_sq = where(has, norm_sq_at[place_at], 0.0)"]
    else:
        lines.append("has = True")
    lines.append("loss = float64(loss_at)" if program.has_loss else "loss = float64(nan)")
    if program.has_incoming:
        lines.append("incoming = float64(incoming_at)")
    if program.numbers:
        lines.append(f"{', '.join(program.numbers)}, = numbers_at")
    lines += [f"{name} = {name}_at" for name in program.vectors]
    for name, length in program.states:
        if length == NUMBER:
            lines.append(f"{name} = float64({name}_at)")
        elif length < -1:
            lines.append(f"{', '.join(f'{name}_{i}' for i in range(-length))} = {name}_at.reshape({-length}, -1)")
        else:
            lines.append(f"{name} = {name}_at.astype(float64, copy=False)")
    lines += body(program)
    for name, length, new, part in stored(program):
        target = f"new_{name}_at" if length >= -1 else f"new_{name}_at.reshape({-length}, -1)[{part}]"
        lines.append(f"{target}[...] = {new}")
    lines += ["new_counts_at[0] = counts_at[0] + clipped", "new_counts_at[1] = counts_at[1] + skip"]
    lines += ["norm_at[...] = norm", "skip_at[...] = skip"]
    lines.append("divisor_at[...] = divisor" + ("[has]" if program.sparse and program.per_tensor else ""))
    if program.guard is not None:
        lines += ["row_at[0], row_at[1], row_at[2], row_at[3], row_at[4] = skip, norm, loss, norm_flag, loss_flag"]
        of_tensors = ["norm_sq_at", *(["flatnonzero(has)"] if program.sparse else [])]
        here = "[has]" if program.sparse else ""
        of_tensors += [f"own_ratio{here}", f"last_ratio{here}"] if program.has_ratios else []
        lines.append("tensors = len(norm_sq_at)")
        for i, values in enumerate(of_tensors):
            lines.append(f"row_at[{COLUMNS} + {i} * tensors : {COLUMNS} + {i + 1} * tensors] = {values}")
    return "\n".join([lines[0], *(f"    {line}" for line in lines[1:])]) + "\n"


def quantile(values: Any, known: Any, q: Any) -> Any:
    """Return the quantile of the ``known`` smallest of ``values``, interpolated as numpy's default."""
    in_order = ordered(values)
    position = (known - 1.0) * q
    below = floor(position)
    low = at(in_order, below)
    high = at(in_order, minimum(below + 1.0, known - 1.0))
    return low + (high - low) * (position - below)


def modulo(number: Any, length: Any) -> Any:
    """Return ``number`` modulo ``length``, both whole and not negative."""
    return number - floor(number / length) * length


def ordered(values: Any) -> Any:
    """Return a vector in ascending order."""
    return np.sort(values)


def at(values: Any, index: Any) -> Any:
    """Return the element of a vector at ``index``, a number."""
    return values[int(index)]


def floor(x: Any) -> Any:
    """Return the largest whole number that is not above ``x``."""
    return math.floor(x)


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller value, or NaN if either value is NaN."""
    return np.minimum(x, y)


HELPERS: dict[str, Any] = {"quantile": quantile, "modulo": modulo}
"""Functions made of the others, which each backend rebinds."""

NUMPY: dict[str, Any] = {
    "absolute": np.abs,
    "at": at,
    "every": np.all,
    "exp": np.exp,
    "flatnonzero": np.flatnonzero,
    "float64": np.float64,
    "floor": floor,
    "index": lambda values: np.arange(len(values)),
    "infinity": math.inf,
    "log": np.log,
    "maximum": np.maximum,
    "minimum": minimum,
    "nan": math.nan,
    "negation": np.logical_not,
    "ones": np.ones_like,
    "ordered": ordered,
    "pick": lambda condition, x, y: x if condition else y,
    "single": lambda x: np.float32(x).astype(np.float64),
    "some": np.any,
    "sqrt": np.sqrt,
    "total": np.sum,
    "where": np.where,
}
"""The functions that a `Fragment` may call, for numpy."""


@cache
def _numpy_function(program: Program) -> Any:
    names: dict[str, Any] = NUMPY | {name: rebind(function, NUMPY) for name, function in HELPERS.items()}
    exec(compile(numpy_text(program), "<decision>", "exec"), names)
    return names["decide"]


Results = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each array that a program writes, by name."""


class Runner(ABC):
    """What runs programs on one device."""

    @abstractmethod
    def upload(self, values: np.ndarray) -> Any:
        """Return values from the host as what `run` takes."""

    @abstractmethod
    def run(self, program: Program, given: Mapping[str, Any], results: Results) -> dict[str, Tensor]:
        """Run a program.

        Args:
            program: The program.
            given: What it reads, by name: tensors, or what `upload` has returned.
            results: What it writes.

        Returns:
            New tensors for ``results``.
        """


class HostRunner(Runner):
    """Runs programs over numpy arrays, without an operation of torch."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Tensor, np.ndarray]] = {}  # to have the array of a state at the next step

    def upload(self, values: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        return values

    def run(self, program: Program, given: Mapping[str, Any], results: Results) -> dict[str, Tensor]:
        """See `Runner`."""
        arrays = {}
        for name, value in given.items():
            known = self._made.get(f"new_{name}")
            if known is not None and known[0] is value:
                value = known[1]
            elif isinstance(value, Tensor):
                value = value.detach().cpu()
                value = (value if value.dtype in _NUMPY else value.double()).numpy()
            arrays[name] = value
        for name, (shape, dtype) in results.items():
            arrays[name] = np.empty(shape, _NUMPY[dtype])
        with np.errstate(all="ignore"):
            _numpy_function(program)(*map(arrays.__getitem__, program.arrays))
        self._made = {name: (torch.from_numpy(arrays[name]), arrays[name]) for name in results}
        return {name: tensor for name, (tensor, _) in self._made.items()}


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
