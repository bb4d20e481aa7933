"""Comparisons of tensors and of state, with the difference in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def change(
    found: Sequence[Tensor], wanted: Sequence[Tensor], *, start: Sequence[Tensor] | None = None, rtol: float = 0.0
) -> str | None:
    """Return the first difference in words; None if there is none.

    Args:
        found: Tensors.
        wanted: Tensors of the same shapes.
        start: Where both came from; None to compare bit by bit.
        rtol: Largest difference as a fraction of the longest way of an element from ``start``.
    """
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = a.detach().to("cpu"), b.detach().to("cpu")
        if torch.equal(a, b) and a.dtype == b.dtype:
            continue
        if a.dtype != b.dtype and start is None:
            return f"parameter {index} is {a.dtype}, not {b.dtype}"
        a, b = wide(a), wide(b)
        if bool(a.isnan().any()) or bool(b.isnan().any()):
            if bool((a.isnan() == b.isnan()).all()) and torch.equal(a.nan_to_num(), b.nan_to_num()):
                continue
            return f"parameter {index} is not a number"
        gap = float((a - b).abs().max())
        if start is None:
            return f"parameter {index} differs by up to {gap:.2g}"
        way = float((b - wide(start[index].detach().to("cpu"))).abs().max())
        size = float(b.abs().max())
        rounding = max(torch.finfo(x.dtype).eps for x in (found[index], wanted[index]))
        if not gap <= rtol * way + 4 * rounding * size:
            return f"parameter {index} differs by {gap:.2g}, where the steps have moved it by {way:.2g}"
    return None


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision, on its device."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def tensors_in(thing: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples, each with the way to it."""
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_in(value, f"{path}[{key!r}]" if not isinstance(key, Tensor) else path)
    elif isinstance(thing, list | tuple):
        for index, value in enumerate(thing):
            yield from tensors_in(value, f"{path}[{index}]")


def snapshot(thing: Any) -> Any:
    """Return nested dicts and lists with copies of the tensors."""
    if isinstance(thing, Tensor):
        return thing.detach().clone()
    if isinstance(thing, dict):
        return {key: snapshot(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(snapshot(value) for value in thing) if type(thing) in (list, tuple) else thing
    return thing


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Return where two nested structures differ; None if they are equal bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype:
            return f"{path} is {b.dtype}, was {a.dtype}"
        if a.shape != b.shape:
            return f"{path} has shape {tuple(b.shape)}, had {tuple(a.shape)}"
        # Bytes that no operation has written are compared as well, therefore NaN equals NaN.
        return None if torch.equal(a.nan_to_num(), b.nan_to_num()) else f"{path} has other values"
    if type(a) is not type(b):
        return f"{path} is {type(b).__name__}, was {type(a).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path} has keys {sorted(map(str, b))}, had {sorted(map(str, a))}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}[{k!r}]")) is not None), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path} has {len(b)} items, had {len(a)}"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{path}[{i}]")) is not None), None)
    if isinstance(a, int | float | str | bool | bytes) and a != b and a == a:
        return f"{path} is {b!r}, was {a!r}"
    return None
