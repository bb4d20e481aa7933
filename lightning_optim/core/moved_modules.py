"""Old import paths of moved modules, supported for one release with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "durations": "core.durations",
    "foreign_decay": "step.foreign_decay",
    "freezing": "factory.freezing",
    "gradients": "step.gradients",
    "histograms": "step.histograms",
    "late_groups": "factory.added_groups",
    "operands": "step.operands",
    "plan": "factory.plan",
    "plan_report": "factory.plan_text",
    "resume": "factory.resume",
    "rules": "kernels.rules",
    "run_report": "diagnostics.run_report",
    "snapshots": "divergence.snapshots",
    "stats": "core.stats",
    "tensorboard": "diagnostics.tensorboard",
    "training_length": "factory.run_length",
    "transfer": "core.transfer",
    "weight_decay": "kernels.weight_decay",
}
"""Old name to new name, both below the package. Remove in 0.2."""

_PACKAGE = "lightning_optim."


class _MovedModules(MetaPathFinder, Loader):
    """Import finder that creates a proxy under the old name, whose attributes are those of the new module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(_PACKAGE)
        return ModuleSpec(fullname, self) if fullname.startswith(_PACKAGE) and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = _PACKAGE + MOVED[module.__name__.removeprefix(_PACKAGE)]
        warnings.warn(f"{module.__name__} has moved to {new}.", DeprecationWarning, stacklevel=2)

        def from_new(name: str) -> Any:
            return getattr(importlib.import_module(new), name)

        module.__getattr__ = from_new  # type: ignore[method-assign]


def keep_old_paths() -> None:
    """Make ``import lightning_optim.<old>`` work, with a DeprecationWarning that names the new path."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
