"""Triton building blocks: compiled functions from text or from a rule's code, and the named functions of rules."""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_serial = itertools.count()


def jit_text(text: str, name: str, names: dict[str, Any], **options: Any) -> Any:
    """Return the function ``name`` defined by ``text`` with globals ``names``, compiled by Triton on first use.

    Triton reads the source of a function through `inspect`, so the text is put into `linecache`, where that looks.
    """
    names |= {"tl": tl, "__name__": __name__}
    filename = f"<triton {name} {next(_serial)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), names)
    return triton.jit(names[name], **options)


def jit(function: Callable[..., Any]) -> Any:
    """Return ``function`` with its own globals, compiled by Triton on first use.

    Annotations but `tl.constexpr`, which Triton would evaluate although it does not know `Any`, and the docstring are
    removed.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        if argument.annotation is not None and ast.unparse(argument.annotation) != "tl.constexpr":
            argument.annotation = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return jit_text(ast.unparse(tree) + "\n", definition.name, function.__globals__.copy())


@jit
def sqrt(x: Any) -> Any:
    """Return the square root."""
    return tl.sqrt(x)


@jit
def absolute(x: Any) -> Any:
    """Return |x|."""
    return tl.abs(x)


@jit
def sign(x: Any) -> Any:
    """Return the sign of ``x``: -1, 0 or 1."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@jit
def where(condition: Any, x: Any, y: Any) -> Any:
    """Return ``x`` where ``condition`` holds, otherwise ``y``."""
    return tl.where(condition, x, y)


@jit
def maximum(x: Any, y: Any) -> Any:
    """Return the larger value, or NaN if either value is NaN."""
    return tl.where((x > y) | (x != x), x, y)


@jit
def minimum(x: Any, y: Any) -> Any:
    """Return the smaller value, or NaN if either value is NaN."""
    return tl.where((x < y) | (x != x), x, y)


NAMED = {
    "sqrt": sqrt,
    "absolute": absolute,
    "sign": sign,
    "where": where,
    "maximum": maximum,
    "minimum": minimum,
}
"""The named functions of rules, with the treatment of NaN described in `rules`."""


SMALL = 2.0**-72
"""Factor of the elements in the second sum of `add_squares`, whose squares then do not overflow float32."""


@jit
def add_squares(sums: Any, offsets: Any, totals: Any) -> Any:
    """Add the block sums of each tensor like `add_blocks`; where x² overflows float32, (x·`SMALL`)² is used.

    `sums` has the square sums of x and of x·`SMALL`, [blocks, 2]; `offsets` and `totals` are as for `add_blocks`.
    """
    tensor = tl.program_id(0)
    block = tl.load(offsets + tensor)
    end = tl.load(offsets + tensor + 1)
    rows = tl.arange(0, 512)
    total = tl.zeros([512], tl.float64)
    while block < end:
        mask = rows < end - block
        plain = tl.load(sums + (block + rows) * 2, mask=mask, other=0).to(tl.float64)
        small = tl.load(sums + (block + rows) * 2 + 1, mask=mask, other=0).to(tl.float64)
        total += tl.where(plain - plain == 0, plain, small * 2.2300745198530623e43)  # 2¹⁴⁴
        block += 512
    tl.store(totals + tensor, tl.sum(total))


MOST_SUMS = 8
"""Largest number of columns that `add_blocks` can add."""


@jit
def add_blocks(sums: Any, offsets: Any, totals: Any, columns: Any) -> Any:
    """Add the block sums of each tensor in a fixed order, with one program per tensor.

    `sums` is [blocks, columns]; `offsets`, [tensors + 1], has the first block of each tensor; `totals`, float64,
    [tensors, columns], is written.
    """
    tensor = tl.program_id(0)
    block = tl.load(offsets + tensor)
    end = tl.load(offsets + tensor + 1)
    rows = tl.arange(0, 512)[:, None]
    lanes = tl.arange(0, 8)[None, :]
    total = tl.zeros([512, 8], tl.float64)
    while block < end:
        mask = (rows < end - block) & (lanes < columns)
        total += tl.load(sums + (block + rows) * columns + lanes, mask=mask, other=0).to(tl.float64)
        block += 512
    lane = tl.arange(0, 8)
    tl.store(totals + tensor * columns + lane, tl.sum(total, axis=0), mask=lane < columns)
