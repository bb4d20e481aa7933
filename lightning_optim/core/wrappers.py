"""What Lightning, Fabric and others wrap around an optimizer or a module, and what is inside.

A wrapper passes attributes on when they are read, and keeps to itself what is set on it. So whatever sets an operand or
a hook on an optimizer has to have the one whose ``step`` computes the update.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

_OPTIMIZER_ATTRIBUTES = ("_optimizer", "optimizer", "base_optimizer")
"""Where wrappers keep the optimizer that they wrap: Lightning's and Fabric's, most others', SAM's."""

_HOOKS = "_optimizer_step_pre_hooks"
"""An attribute that torch's constructor sets; a wrapper that imitates the class of an optimizer does not have it."""


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer that has torch's step hooks, itself or inside of wrappers.

    Args:
        optimizer: An optimizer, or what `lightning.fabric.Fabric.setup` or ``LightningModule.optimizers()`` return.

    Raises:
        TypeError: There is none.
    """
    found, seen = optimizer, set()
    while not (isinstance(found, Optimizer) and _HOOKS in vars(found)):
        seen.add(id(found))
        attributes = getattr(found, "__dict__", {})
        found = next((attributes[name] for name in _OPTIMIZER_ATTRIBUTES if name in attributes), None)
        if found is None or id(found) in seen:
            raise TypeError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer, has no step hooks and wraps (as `optimizer`) "
                "none that has, so its steps cannot be clipped, guarded or monitored. Needed is a subclass of "
                "torch.optim.Optimizer whose __init__ calls super().__init__(params, defaults)."
            )
    return found


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the module that Fabric has wrapped, whose parameters have the names that its author gave them.

    Args:
        module: A module, or what `lightning.fabric.Fabric.setup` returns.
    """
    # Of the type: a module of the user's may have anything for `module`. Fabric itself must not be imported here.
    while type(module).__name__ == "_FabricModule" and isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module
