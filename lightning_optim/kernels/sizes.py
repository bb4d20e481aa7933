"""Numbers of elements of the tensors of a batch, with what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Sizes:
    """Numbers of elements of many tensors, which do not change as long as a batch is valid.

    Args:
        numel: Number of elements of each tensor.
        kept: What a backend keeps that depends on nothing else, such as tables of blocks.
    """

    numel: tuple[int, ...]
    kept: dict[Any, Any] = field(default_factory=dict)
