"""Matrices that a parameter consists of: one, a flattened kernel, a stack, or the pieces of a fused projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.suggest import nearest

AUTO = "auto"
"""Value of `split` by which fused projections are found from modules and names."""

Split = int | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """How a parameter is cut into matrices.

    A projection that computes several things at once (query, key and value; gate and up) is one parameter and several
    matrices. They follow each other along the rows or the columns, in runs of equal size; with ``repeats`` above 1 the
    whole sequence is repeated, as in [heads, 3, head size], and the blocks of one place together are one matrix.

    Args:
        lead: Number of matrices of a stack, as (matrices,); () for a single one.
        rows: Rows of each matrix before it is cut.
        columns: Columns of each matrix before it is cut.
        dim: -2 if the rows are cut, -1 if the columns are.
        runs: (number of blocks, size of each) along that dimension; () if nothing is cut.
        repeats: How often the runs are repeated.
    """

    lead: tuple[int, ...]
    rows: int
    columns: int
    dim: int = -2
    runs: tuple[tuple[int, int], ...] = ()
    repeats: int = 1

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices of each result of `take`."""
        if not self.runs:
            return ((self.rows, self.columns),)
        sizes = [size * self.repeats for _, size in self.runs]
        return tuple((size, self.columns) if self.dim == -2 else (self.rows, size) for size in sizes)

    @property
    def pieces(self) -> int:
        """Number of pieces that each matrix is cut into; 1 if it is whole."""
        return sum(count for count, _ in self.runs) if self.runs else 1

    def take(self, tensor: Tensor) -> list[Tensor]:
        """Cut a tensor into its matrices.

        Args:
            tensor: Shape of the parameter, or [*lead, rows, columns].

        Returns:
            [rows, columns] or [matrices, rows, columns] of a whole one; else [matrices · blocks, rows, columns] for
            each run. They are views of ``tensor`` where its memory allows.
        """
        x = tensor.reshape(*self.lead, self.rows, self.columns)
        if not self.runs:
            return [x]
        x = x.view(math.prod(self.lead), self.rows, self.columns)
        x = x if self.dim == -2 else x.mT
        x = torch.unflatten(x, -2, (self.repeats, x.shape[-2] // self.repeats))
        taken = []
        parts = x.split_with_sizes([count * size for count, size in self.runs], -2)
        for (count, size), part in zip(self.runs, parts, strict=True):
            # [matrices, repeats, blocks, size, others] -> [matrices · blocks, repeats · size, others]
            block = torch.unflatten(part, -2, (count, size)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            taken.append(block if self.dim == -2 else block.mT)
        return taken

    def put(self, taken: Sequence[Tensor]) -> Tensor:
        """Put together what `take` has cut.

        Args:
            taken: Tensors in the shapes of the results of `take`.

        Returns:
            Shape [*lead, rows, columns], contiguous if the matrices are cut.
        """
        if not self.runs:
            return taken[0]
        parts = []
        for (count, size), block in zip(self.runs, taken, strict=True):
            block = block if self.dim == -2 else block.mT
            block = torch.unflatten(block, 0, (math.prod(self.lead), count))
            block = torch.unflatten(block, 2, (self.repeats, size))
            parts.append(block.transpose(1, 2).flatten(2, 3))
        x = (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).flatten(1, 2)
        return (x if self.dim == -2 else x.mT).reshape(*self.lead, self.rows, self.columns).contiguous()

    @property
    def of_rows(self) -> MatrixForm:
        """The form of one number for each row of each piece, [*lead, rows, pieces along the columns]."""
        if self.dim == -2 or not self.runs:
            return replace(self, columns=1)
        runs = tuple((count, 1) for count, _ in self.runs)
        return replace(self, columns=self.pieces, runs=runs, repeats=1)

    @property
    def of_line(self) -> MatrixForm:
        """The form of one number for each row, if the rows are cut or nothing is, else for each column."""
        return replace(self, columns=1) if self.dim == -2 else replace(self, rows=1)

    @property
    def products(self) -> int:
        """Multiplications and additions of x·xᵀ, its square, and a square matrix times x, over all matrices."""
        counts = [count for count, _ in self.runs] or [1]
        sides = [sorted(shape) for shape in self.shapes]
        each = [4 * small * small * large + 2 * small**3 for small, large in sides]
        return math.prod(self.lead) * sum(count * products for count, products in zip(counts, each, strict=True))

    def __str__(self) -> str:
        """Describe the form for plans."""
        if self.runs:
            sizes = zip(self.runs, self.shapes, strict=True)
            cut = " + ".join(
                f"{count} x {list(shape)}" if count > 1 else f"{list(shape)}" for (count, _), shape in sizes
            )
            turns = f", interleaved {self.repeats} times" if self.repeats > 1 else ""
            return f"{_stack_of(self.lead)}split into {cut}{turns}"
        if self.lead:
            return f"{_stack_of(self.lead)}{[self.rows, self.columns]}"
        return f"matrix {[self.rows, self.columns]}"


def matrix_form(param: Tensor, group: Mapping[str, Any]) -> MatrixForm:
    """Return how ``param`` is cut by the keys `flatten`, `split`, `split_dim` and `split_repeats` of its group.

    Args:
        param: The parameter, of two or more dimensions; only its shape is read.
        group: Its parameter group.

    Raises:
        ValueError: The shape cannot be cut like that; the message is a sentence about "it".

    Example:
        >>> import torch
        >>> qkv = torch.zeros(48, 16)
        >>> print(matrix_form(qkv, {"flatten": None, "split": 3}))
        split into 3 x [16, 16]
        >>> print(matrix_form(qkv, {"flatten": None, "split": (32, 8, 8)}))
        split into [32, 16] + 2 x [8, 16]
        >>> [tuple(part.shape) for part in matrix_form(qkv, {"flatten": None, "split": (32, 8, 8)}).take(qkv)]
        [(1, 32, 16), (2, 8, 16)]
    """
    split = group.get("split")
    if isinstance(split, str):  # not resolved, as in a group of another optimizer
        split = None
    elif isinstance(split, Sequence):
        split = tuple(split)
    stack = param.dim() > 2 and group["flatten"] is False
    return _form(tuple(param.shape), stack, split, group.get("split_dim", -2), group.get("split_repeats", 1))


def check_form(owner: str, group: Mapping[str, Any], auto: bool) -> None:
    """Check the keys `flatten`, `split`, `split_dim` and `split_repeats` of a group by themselves.

    Args:
        owner: Name of the optimizer, for messages.
        group: The complete parameter group.
        auto: Whether `split` may be `auto`.

    Raises:
        ValueError: A value is not valid.
    """
    if not (group["flatten"] is None or isinstance(group["flatten"], bool)):
        raise ValueError(f"{owner}: Invalid flatten={group['flatten']!r}: must be None, True or False.")
    split = group["split"]
    sizes = split if isinstance(split, list | tuple) else () if split is None else (split,)
    if split == AUTO and auto:
        sizes = ()
    if not all(type(size) is int and size >= 1 for size in sizes) or split in ((), []):
        near = nearest(split, [AUTO]) if auto and isinstance(split, str) else ""
        hint = f" {near}" if near.startswith("Did") else ""
        raise ValueError(
            f"{owner}: Invalid split={split!r}: must be {repr(AUTO) + ', ' if auto else ''}None, a number of equal "
            f"blocks of at least 1, or a list of their sizes, for instance 3 or (1024, 256, 256).{hint}"
        )
    if group["split_repeats"] > 1 and not sizes:
        raise ValueError(
            f"{owner}: Invalid split_repeats={group['split_repeats']}: must be 1 without a split, which is {split!r}."
        )


def refuse_split(owner: str, group: Mapping[str, Any], because: str) -> None:
    """Refuse the key `split` in a group of an optimizer that does not cut parameters.

    Args:
        owner: Name of the optimizer, for messages.
        group: The complete parameter group.
        because: Reason, as a sentence without full stop.

    Raises:
        ValueError: The group has a `split`.
    """
    split = group.get("split")
    if split is not None and split != AUTO:
        raise ValueError(
            f"{owner}: split={split!r} of a group is not offered: {because}. Leave it out or set it to None; as "
            "parameters of their own, the pieces are treated separately."
        )


@lru_cache(maxsize=4096)
def _form(shape: tuple[int, ...], stack: bool, split: Split, split_dim: int, repeats: int) -> MatrixForm:
    """Return the form of a parameter of ``shape``."""
    lead: tuple[int, ...]
    if stack:
        *leading, rows, columns = shape
        lead = (math.prod(leading),)
    else:
        lead, rows, columns = (), shape[0], math.prod(shape[1:])
    if split is None or split == 1:
        return MatrixForm(lead, rows, columns)
    first = len(shape) - 2 if stack else 0
    dims = {first: -2, first + 1: -1, -2: -2, -1: -1}
    if split_dim not in dims:
        what = "counts the matrices of its stack" if stack and -len(shape) <= split_dim < first else "does not exist"
        raise ValueError(
            f"its shape is {shape}, and split_dim={split_dim} {what}. Needed is {first} or -2 for the rows of each "
            f"matrix, or {first + 1} or -1 for its columns."
        )
    dim = dims[split_dim]
    size, other = (rows, columns) if dim == -2 else (columns, rows)
    sizes = _sizes(size, split, repeats)
    if sizes is None:
        raise ValueError(
            _does_not_fit(shape, dim, size, split, repeats, fits=_sizes(other, split, repeats) is not None)
        )
    runs = tuple((len(list(run)), size) for size, run in groupby(sizes))
    return MatrixForm(lead, rows, columns, dim, runs, repeats)


def _sizes(size: int, split: Split, repeats: int) -> tuple[int, ...] | None:
    """Return the sizes of the blocks of a dimension of ``size``; None if it cannot be cut like that."""
    if isinstance(split, int):
        return (size // repeats // split,) * split if size % (split * repeats) == 0 else None
    assert split is not None
    return split if sum(split) * repeats == size else None


def _does_not_fit(shape: tuple[int, ...], dim: int, size: int, split: Split, repeats: int, fits: bool) -> str:
    """Return the sentence about a dimension of ``size`` that cannot be cut; ``fits``: the other one could be."""
    what, other = ("rows", "split_dim=-1") if dim == -2 else ("columns", "split_dim=-2")
    times = f" times split_repeats={repeats}" if repeats > 1 else ""
    text = f"its shape is {shape}, and {size} {what} cannot be cut by split={split!r}{times}: "
    if isinstance(split, int):
        parts = split * repeats
        near = sorted((n for n in range(2, size + 1) if size % n == 0), key=lambda n: abs(n - parts))[:2]
        text += f"they are no multiple of {parts}."
        text += f" Nearest numbers of blocks: {' and '.join(map(str, sorted(near)))}." if near else ""
    else:
        assert split is not None
        total = sum(split) * repeats
        off = f"{abs(size - total)} too {'few' if total < size else 'many'}"
        text += f"they need {size}, and these add up to {total}, {off}."
    return f"{text} The other dimension would fit: {other}." if fits else text


def _stack_of(lead: tuple[int, ...]) -> str:
    return f"stack of {lead[0]}, each " if lead else ""
