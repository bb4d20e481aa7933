"""Partition of a batch into parts that are updated one after the other, which bounds temporary memory."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.rules import TensorRule

SHARE = 32
"""Reciprocal of the largest fraction of a float32 batch that one part may be; a part of a 16-bit batch, which the
arithmetic widens, may be half as large. The seven copies of a part that the costliest step holds then stay below 0.3 of
the parameters."""

IN_PLACE = 3
"""How many times as large a part may be whose step is taken in place, with at most five bfloat16 copies of it."""

AT_LEAST = {"cpu": 2**18}
"""Smallest limit on the elements of a part, by device: saving less than a megabyte is not worth a loop."""

AT_LEAST_ELSEWHERE = 2**22
"""Smallest limit on other devices, 16 MB in float32: below that, a GPU would wait for kernel launches."""

AT_MOST = {"cpu": 2**21}
"""Largest limit on the elements of a part, by device: temporaries of this size still fit into the CPU's cache."""

AT_MOST_ELSEWHERE = 2**25
"""Largest limit on other devices, 128 MB in float32: larger parts are not faster."""

_SHAPE = operator.attrgetter("shape")


def parts(batch: Batch, times: int = 1) -> Iterator[list[int]]:
    """Partition ``batch`` into parts that are updated in one call each.

    Tensors that a tensor rule can process together (`TensorRule.together`) share a part as far as the limits above
    allow. A sharded tensor counts with its full size, so that all ranks make the same parts: a sum over shards is a
    collective that all of them must enter together.

    Args:
        batch: The batch to partition.
        times: Factor of the limits that bound temporary memory.

    Yields:
        Indices of the tensors of a part; every tensor is in exactly one part.
    """
    sizes = list(map(Tensor.numel, batch.full_params))
    largest = largest_part(batch, sizes, times)
    if not isinstance(batch.rule, TensorRule):
        yield from cut(range(len(sizes)), sizes, largest)
        return
    alike: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys(batch, batch.rule)):
        if key in alike:
            alike[key].append(i)
        else:
            alike[key] = [i]
    for rows in alike.values():
        yield from cut(rows, sizes, largest)


def largest_part(batch: Batch, sizes: Sequence[int], times: int = 1) -> int:
    """Return the largest number of elements of a part of ``batch``, whose tensors have ``sizes`` elements."""
    device, stored = batch.device.type, batch.params[0].element_size() / batch.dtype.itemsize
    largest = times * max(int(sum(sizes) * stored) // SHARE, AT_LEAST.get(device, AT_LEAST_ELSEWHERE))
    return min(largest, AT_MOST.get(device, AT_MOST_ELSEWHERE))


def keys(batch: Batch, rule: TensorRule) -> list[Hashable]:
    """Return for each tensor a key that is equal for those which one call of the rule may process."""
    # `together` is called once per group and shape, because a model has hundreds of matrices but few shapes.
    answers: dict[tuple[int, torch.Size], Hashable] = {}
    found: list[Hashable] = []
    for i, kind in enumerate(zip(map(id, batch.groups), map(_SHAPE, batch.full_params), strict=True)):
        if kind not in answers:
            answers[kind] = rule.together(batch.full_params[i], batch.groups[i])
        found.append(("alone", i) if answers[kind] is None else ("with", answers[kind]))
    return found


def cut(rows: range | list[int], sizes: Sequence[int], largest: int) -> Iterator[list[int]]:
    """Yield consecutive runs of ``rows`` with at most ``largest`` elements; a larger tensor is a run by itself."""
    part: list[int] = []
    elements = 0
    for row in rows:
        if part and elements + sizes[row] > largest:
            yield part
            part, elements = [], 0
        part.append(row)
        elements += sizes[row]
    if part:
        yield part
