"""Optimizers with one defect each, and the checks that fail for it."""

from __future__ import annotations

DEFECTS: dict[str, tuple[type, set[str]]] = {}
"""By name of the class: the class, and all checks of the default run that fail."""


def fails(*names):
    def register(cls):
        DEFECTS[cls.__name__] = (cls, set(names))
        return cls

    return register


from tests.testing import defects_of_steps, defects_of_values  # noqa: E402, F401 - they fill it
