"""The two packages of Lightning: `pytorch_lightning` has the same code as `lightning.pytorch`, in classes of its own.

A Trainer of either takes our callbacks, because Lightning asks of a callback that it has the hooks. What we ask of its
modules, loggers and callbacks is asked here, by name, so that it holds for both.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

_ROOTS = ("lightning", "lightning_fabric", "pytorch_lightning")


def lightning_class(obj: Any, name: str) -> type | None:
    """Return Lightning's class of this name among the classes of ``obj``, of either package; None if there is none.

    Args:
        obj: The object.
        name: Name of the class: ``"LightningModule"``, ``"TensorBoardLogger"``.
    """
    classes = type(obj).__mro__
    return next((cls for cls in classes if cls.__name__ == name and cls.__module__.split(".")[0] in _ROOTS), None)


def is_lightning(obj: Any, name: str) -> bool:
    """Return whether ``obj`` is an instance of Lightning's class of this name, of either package."""
    return lightning_class(obj, name) is not None


def module_overrides(module: Any, method: str) -> bool:
    """Return whether a LightningModule, of either package, overrides a method."""
    parent: Any = lightning_class(module, "LightningModule")
    return parent is not None and is_overridden(method, module, parent)


def callback_overrides(callback: Any, method: str) -> bool:
    """Return whether a callback, of either package, overrides a hook; also one that is no subclass of Lightning's."""
    hook = getattr(callback, method, None)
    parent: Any = lightning_class(callback, "Callback")
    return parent is None or getattr(hook, "__func__", hook) is not getattr(parent, method)


def tensorboard_loggers(trainer: Any) -> list[Any]:
    """Return the Trainer's loggers that are Lightning's `TensorBoardLogger`, of either package."""
    return [logger for logger in trainer.loggers if is_lightning(logger, "TensorBoardLogger")]
