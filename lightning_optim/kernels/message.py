"""Messages between ranks: tensors of several dtypes in one buffer, and their exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNED = 16
"""Number of bytes of which the place of a tensor in a message is a multiple, so that any dtype can be read there."""


class Message:
    """Tensors of several dtypes in one buffer of bytes.

    Args:
        forms: Shape and dtype of each tensor.
        device: Where the buffer is.
        length: Number of bytes, if more than the tensors need.
        buffer: Memory to use, uint8, [bytes]; None for new memory.
    """

    def __init__(
        self,
        forms: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        length: int = 0,
        buffer: Tensor | None = None,
    ) -> None:
        self.forms = forms
        self.sizes = [_bytes(shape, dtype) for shape, dtype in forms]
        length = max(length, sum(self.sizes))
        self.buffer = torch.empty(length, dtype=torch.uint8, device=device) if buffer is None else buffer

    @staticmethod
    def length(forms: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
        """Return the number of bytes of the tensors."""
        return sum(_bytes(shape, dtype) for shape, dtype in forms)

    def read(self) -> list[Tensor]:
        """Return the tensors as views of the buffer."""
        views, first = [], 0
        for (shape, dtype), size in zip(self.forms, self.sizes, strict=True):
            count = math.prod(shape) * dtype.itemsize
            views.append(self.buffer[first : first + count].view(dtype).view(shape))
            first += size
        return views

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors`` into the buffer, cast to its dtypes."""
        if tensors:
            torch._foreach_copy_(self.read(), list(tensors))

    def split(self, counts: Sequence[int]) -> list[int]:
        """Return the number of bytes of each run of ``counts`` tensors."""
        found, first = [], 0
        for count in counts:
            found.append(sum(self.sizes[first : first + count]))
            first += count
        return found


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED


def all_to_all(
    came: Message, came_counts: Sequence[int], sent: Message, sent_counts: Sequence[int], group: Any
) -> Callable[[Message], None]:
    """Start an exchange; return a function that waits for it, given the sent message, which must live until then."""
    work = dist.all_to_all_single(
        came.buffer, sent.buffer, came.split(came_counts), sent.split(sent_counts), group, async_op=True
    )

    def wait(sent: Message) -> None:
        if work is not None:
            work.wait()

    return wait
