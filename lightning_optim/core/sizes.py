"""Sizes in bytes, of tensors and as text."""

from __future__ import annotations

from torch import Tensor


def span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element to the end of the last one."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.nbytes
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size()


def format_bytes(count: float) -> str:
    """Format ``count`` bytes with three digits and a decimal unit.

    Example:
        >>> format_bytes(84e9), format_bytes(1536)
        ('84 GB', '1.54 kB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
