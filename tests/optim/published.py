"""The published optimizers that ours are compared with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def timm(module: str) -> Any:
    """``timm.optim.<module>``, without importing timm's models, which want torchvision."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (folder,) = spec.submodule_search_locations
        for name, path in (("timm", folder), ("timm.optim", f"{folder}/optim")):
            package = types.ModuleType(name)
            package.__path__ = [path]
            sys.modules[name] = package
    return importlib.import_module(f"timm.optim.{module}")
