"""The published optimizers that ours are compared with."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def timm(module: str, package: str = "optim") -> Any:
    """``timm.<package>.<module>``, without importing timm's models, which want torchvision."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (folder,) = spec.submodule_search_locations
        for name in ("timm", "timm.optim", "timm.utils"):
            stub = types.ModuleType(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # transformers looks for it
            stub.__path__ = [str(Path(folder, *name.split(".")[1:]))]
            sys.modules[name] = stub
    return importlib.import_module(f"timm.{package}.{module}")
