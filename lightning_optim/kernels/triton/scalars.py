"""The scalars of a step on an accelerator, from its step counts and the host's hyperparameters, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from lightning_optim.core.host import read
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.recorded import Recorded, constant
from lightning_optim.kernels.scalars import numbers_of_group, places_of, scalar_columns
from lightning_optim.kernels.triton.functions import NAMED, jit, jit_text
from lightning_optim.kernels.triton.launch import address_table, flag, launch, stream_of

LANES = 128
"""Number of tensors of one program."""


@dataclass(frozen=True)
class Form:
    """What the kernel of a batch depends on.

    Args:
        expressions: Text of each scalar, by name.
        constants: Number of constants, which each group has its own values of.
        states: Name and dtype of each 0-d state of a tensor.
        columns: Names of the scalars to store, in order.
        divisor: Number of dimensions of the divisor; None without one.
        advances: Whether to store the next 0-d state.
    """

    expressions: tuple[tuple[str, str], ...]
    constants: int
    states: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    divisor: int | None
    advances: bool

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the kernel's arguments, in order."""
        divisor = () if self.divisor is None else ("divisor",)
        return ("addresses", "groups", "constants", "table", "skip", *divisor, "tensors")


class DeviceColumns(dict[str, Tensor]):
    """Scalars by name, computed in one launch when they are first asked for.

    The same launch advances the 0-d state, unless a rule still has to see the scalars one by one.

    Args:
        batch: The batch, whose `scalar_states` are written unless the step is skipped.
        divisor: Divisor of the gradients, shape [] or [tensors]; None for 1.
        skip: Flag, shape []; if non-zero, nothing is written. None to never skip.
        expressions: Text of each scalar, by name.
        constants: Values of the constants in the text, [groups, constants].
        at_once: Whether all scalars are needed one by one, and not only the table of one kernel.

    Attributes:
        has_advanced: Whether the 0-d state needs no `scalars.commit` after the step.
    """

    def __init__(
        self,
        batch: Batch,
        divisor: Tensor | None,
        skip: Tensor | None,
        expressions: dict[str, str],
        constants: np.ndarray,
        at_once: bool,
    ) -> None:
        super().__init__()
        self._batch, self._divisor, self._skip = batch, divisor, skip
        self._expressions, self._constants = expressions, constants
        self.has_advanced = not at_once  # A rule may have changed the next state by the end of the step.
        self._table: tuple[tuple[str, ...], Tensor] | None = None

    def __missing__(self, name: str) -> Tensor:
        names, table = self._table or self._compute(tuple(self._expressions), torch.float64)
        column = self[name] = table[:, places_of([name], names)[0]]
        return column

    def table(self, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """Return the columns called ``names`` side by side, [tensors, names], in ``dtype``."""
        if self._table is None and self.has_advanced and not self:
            return self._compute(names, dtype)[1]
        return torch.stack([self[name] for name in names], dim=1).to(dtype)

    @property
    def known(self) -> frozenset[str]:
        """Names of all scalars."""
        return frozenset(self._expressions)

    def form(self, names: tuple[str, ...]) -> Form:
        """Return what a kernel that stores the columns called ``names`` depends on."""
        states = tuple((name, _NAMES[dtype]) for name, dtype in self._batch.scalar_dtypes.items())
        used = dict.fromkeys((*names, *(name for name, _ in states if name != "step")))
        expressions = tuple((name, self._expressions[name]) for name in used)
        divisor = None if self._divisor is None else self._divisor.dim()
        return Form(expressions, self._constants.shape[1], states, names, divisor, self.has_advanced)

    def _compute(self, names: tuple[str, ...], dtype: torch.dtype) -> tuple[tuple[str, ...], Tensor]:
        batch, device = self._batch, self._batch.device
        count = len(batch.params)
        table = torch.empty(count, len(names), dtype=dtype, device=device)
        stream = stream_of(device)
        addresses, groups = (address_table(numbers, device, stream) for numbers in batch.scalar_tables)
        constants = _constants(self._constants.tobytes(), device, stream)
        arguments = [addresses, groups, constants, table, flag(self._skip, device)]
        arguments += [] if self._divisor is None else [self._divisor]
        launch(scalar_kernel(self.form(names)), -(-count // LANES), device, *arguments, count)
        self._table = names, table
        return self._table


def device_scalars(batch: Batch, divisor: Tensor | None, skip: Tensor | None, at_once: bool) -> dict[str, Tensor]:
    """Compute the same as `scalar_columns`, in one launch where that is possible, else by operations of torch.

    It is possible if the host knows all hyperparameters (a learning rate that is a tensor on the device is one that it
    does not), if no values are shared by all tensors, and if all groups lead to the same expressions.

    Args:
        batch: The batch.
        divisor: Divisor of the gradients, shape [] or [tensors]; None for 1.
        skip: Flag, shape []; if non-zero, nothing is written. None to never skip.
        at_once: See `DeviceColumns`.
    """
    states = batch.scalar_dtypes  # by name
    if batch.shared or batch.rounding_keys or not all(map(_NAMES.__contains__, states.values())):
        return scalar_columns(batch, divisor)
    texts: dict[str, str] | None = None
    rows: list[list[float]] = []
    for group in batch.members[0]:
        known = {name: _readable(value) for name, value in group.items() if name != "params"}
        if any(isinstance(value, Tensor) for value in known.values()):
            return scalar_columns(batch, divisor)
        constants: list[float] = []
        old = {name: Recorded(f"old_{name}", constants) for name in states}
        try:
            numbers = numbers_of_group(batch, known, old)
            own = {
                name: value.text if isinstance(value, Recorded) else constant(value, constants)
                for name, value in numbers.items()
            }
        except TypeError:  # Its arithmetic is not only that of numbers.
            return scalar_columns(batch, divisor)
        if texts is not None and own != texts:
            return scalar_columns(batch, divisor)
        texts = own
        rows.append(constants)
    assert texts is not None
    divisor = None if divisor is None else divisor.contiguous()  # The kernel knows no strides.
    return DeviceColumns(batch, divisor, skip, texts, np.array(rows, dtype=np.float64), at_once)


def _readable(value: Any) -> Any:
    return read(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@lru_cache(maxsize=64)
def _constants(values: bytes, device: torch.device, stream: int) -> Tensor:
    """Upload constants; most steps have the same ones, or new ones because the learning rate is another."""
    return upload(np.frombuffer(values, dtype=np.float64), device)


def text(form: Form) -> str:
    """Return the text of the kernel."""
    lines = [f"def kernel({', '.join(form.arguments)}):"]
    lines += [f"i = tl.program_id(0) * {LANES} + tl.arange(0, {LANES})", "inside = i < tensors"]
    lines += [f"row = tl.load(groups + i, mask=inside, other=0) * {form.constants}"]
    used = " ".join(expression for _, expression in form.expressions)
    for k, (name, dtype) in enumerate(form.states):
        pointer = f"tl.load(addresses + i * {len(form.states)} + {k}, mask=inside, other=0)"
        lines.append(f"at_{name} = {pointer}.to(tl.pointer_type(tl.{dtype}))")
        lines.append(f"old_{name} = tl.load(at_{name}, mask=inside, other=0.0).to(tl.float64)")
    numbers = [j for j in range(form.constants) if f"c{j}" in _words(used)]
    lines += [f"c{j} = tl.load(constants + row + {j}, mask=inside, other=1.0)" for j in numbers]
    lines += [f"value_{name} = {expression}" for name, expression in form.expressions]
    if form.divisor is not None and "inverse_divisor" in dict(form.expressions):
        there = "divisor + i, mask=inside, other=1.0" if form.divisor else "divisor"
        lines.append(f"value_inverse_divisor = value_inverse_divisor / tl.load({there}).to(tl.float64)")
    columns = len(form.columns)
    lines += [
        f"tl.store(table + i * {columns} + {k}, value_{name}.to(table.dtype.element_ty), mask=inside)"
        for k, name in enumerate(form.columns)
    ]
    advanced = form.states if form.advances else ()
    if advanced:
        lines.append("if tl.load(skip) == 0:")
    for name, dtype in advanced:
        new = "old_step + 1.0" if name == "step" else f"value_{name}"
        lines.append(f"    tl.store(at_{name}, ({new}).to(tl.{dtype}), mask=inside)")
    return "\n".join([lines[0], *(f"    {line}" for line in lines[1:])]) + "\n"


def _words(expression: str) -> set[str]:
    for sign in "()+-*/<>=!&|,":
        expression = expression.replace(sign, " ")
    return set(expression.split())


@jit
def power(x: Any, y: Any) -> Any:
    """Return x to the power y, for x of at least 0."""
    return tl.where(y == 0, 1.0, tl.exp(tl.log(x) * y))


@cache
def scalar_kernel(form: Form) -> Any:
    """Return the kernel of a form."""
    names = [
        "addresses",
        "groups",
        "constants",
        "table",
        "skip",
        *([] if form.divisor is None else ["divisor"]),
        "tensors",
    ]
    return jit_text(text(form), "kernel", {**NAMED, "power": power}, do_not_specialize=names)


_NAMES: dict[torch.dtype | None, str] = {torch.float32: "float32", torch.float64: "float64"}
