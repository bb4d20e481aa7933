"""How differences between a checkpoint and the configuration are found and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Tell = Callable[[str, bool], None]
"""Receives a message, and whether it is a warning, that is, whether the configuration was overruled."""

HINT = 'Say on_resume="config" to have the configuration\'s.'


def differ(a: Any, b: Any) -> bool:
    """Return whether two values of a hyperparameter differ; lists and tuples of the same numbers do not."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return float(a) != float(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # tuples become lists in some formats
        return len(a) != len(b) or any(differ(x, y) for x, y in zip(a, b, strict=True))
    return bool(a != b)


def shown(value: Any) -> str:
    """Return a value as text for a message."""
    if isinstance(value, Tensor):
        value = float(value)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
