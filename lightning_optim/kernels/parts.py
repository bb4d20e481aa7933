"""Which tensors of a batch are worked on at once, where that takes memory beyond theirs."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.rules import TensorRule

SHARE = 32
"""A part is at most this fraction of a float32 batch, and half of that of one in 16 bits, which the arithmetic widens:
the seven copies of a part that the costliest step holds then stay below 0.3 of the parameters."""

AT_LEAST = {"cpu": 2**18}
"""Elements that are worked on at once even in a small model, by device: a megabyte is worth no loop."""

AT_LEAST_ELSEWHERE = 2**22
"""16 MB: below that a GPU waits for launches."""

AT_MOST = {"cpu": 2**21}
"""Elements of a part, by device: as many as temporaries leave in the CPU's cache."""

AT_MOST_ELSEWHERE = 2**25
"""128 MB in float32: more gains no speed."""

_SHAPE = operator.attrgetter("shape")


def parts(batch: Batch) -> Iterator[list[int]]:
    """Cut ``batch`` into parts that go through one update each.

    What a tensor rule says it batches (`TensorRule.together`) is together, as far as the sizes above allow. Sharded
    tensors count whole, so that all ranks cut alike: sums over shards wait for each other.

    Args:
        batch: What to cut.

    Yields:
        Indices of the tensors of a part; every tensor is in one part.
    """
    sizes = list(map(Tensor.numel, batch.full_params))
    device, stored = batch.device.type, batch.params[0].element_size() / batch.dtype.itemsize
    largest = max(int(sum(sizes) * stored) // SHARE, AT_LEAST.get(device, AT_LEAST_ELSEWHERE))
    largest = min(largest, AT_MOST.get(device, AT_MOST_ELSEWHERE))
    rule = batch.rule
    if not isinstance(rule, TensorRule):
        yield from _cut(range(len(sizes)), sizes, largest)
        return
    # Asked once for each group and shape: a model has hundreds of matrices, and few shapes.
    answers: dict[tuple[int, torch.Size], Hashable] = {}
    alike: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(zip(map(id, batch.groups), map(_SHAPE, batch.params), strict=True)):
        if kind not in answers:
            answers[kind] = rule.together(batch.params[i], batch.groups[i])
        key = ("alone", i) if answers[kind] is None else ("with", answers[kind])
        if key in alike:
            alike[key].append(i)
        else:
            alike[key] = [i]
    for rows in alike.values():
        yield from _cut(rows, sizes, largest)


def _cut(rows: range | list[int], sizes: list[int], largest: int) -> Iterator[list[int]]:
    """``rows`` in runs of at most ``largest`` elements, or of one tensor that is larger."""
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
