"""The command line: `lightning-optim`, and LightningCLI with keys for the callbacks of this package.

Names are imported on first use, so that `lightning-optim --version` and `list` do not load Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_optim.cli.command import main, require_extra

if TYPE_CHECKING:
    from lightning_optim.cli.keys import OptimKeys as OptimKeys
    from lightning_optim.cli.optim_cli import OptimCLI as OptimCLI
    from lightning_optim.cli.optim_cli import PlanningTrainer as PlanningTrainer

_NAMES = {"OptimCLI": "optim_cli", "OptimKeys": "keys", "PlanningTrainer": "optim_cli"}

__all__ = ["OptimCLI", "OptimKeys", "PlanningTrainer", "main"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        require_extra()
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
