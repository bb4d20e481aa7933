"""Optimizers with one defect each, and the checks that fail for it."""

from __future__ import annotations

DEFECTS: dict[str, tuple[type, set[str]]] = {}
"""By name of the class: the class, and all checks of the default run that fail."""


def fails(*names):
    def register(cls):
        DEFECTS[cls.__name__] = (cls, set(names))
        return cls

    return register


from tests.testing import (  # noqa: E402 - they fill it
    defects_of_shapes,  # noqa: F401
    defects_of_state,  # noqa: F401
    defects_of_steps,  # noqa: F401
    defects_of_values,  # noqa: F401
)
