"""What the module and the Trainer tell about parameters: their names, their order, and which are frozen on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from types import CodeType, FunctionType

import lightning.pytorch as L
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from lightning_optim.callbacks._lightning import plain_name
from lightning_optim.divergence.parameter_map import ParameterMap


class ModelParameters:
    """Parameters of a module, at the start of training.

    Args:
        trainer: The Trainer.
        pl_module: The module.

    Attributes:
        names: Name of each parameter, in the order of the module.
    """

    def __init__(self, trainer: L.Trainer, pl_module: nn.Module) -> None:
        self.names: dict[Tensor, str] = {param: plain_name(name) for name, param in pl_module.named_parameters()}
        modules = {plain_name(f"{name}.")[:-1]: module for name, module in pl_module.named_modules()}
        self._sequential = [name for name, module in modules.items() if isinstance(module, nn.Sequential)]
        self._owners = {param: module for module in modules.values() for param in module.parameters(recurse=False)}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._will_unfreeze = any(isinstance(callback, BaseFinetuning) for callback in callbacks) or any(
            map(_may_unfreeze, {type(pl_module), *map(type, callbacks)})
        )

    def map_of(self, params: Sequence[Tensor], names: dict[int, str]) -> ParameterMap:
        """Return the relations between the parameters of an optimizer.

        Args:
            params: The parameters, in order.
            names: Name of each, by its place.
        """
        shapes = [tuple(param.shape) for param in params]
        return ParameterMap(names, shapes, list(self.names.values()), self._sequential)

    def is_frozen_on_purpose(self, param: Tensor) -> bool:
        """Return whether a parameter is frozen, and more than `requires_grad` shows that this is meant.

        That is so if the module or a callback has code that unfreezes parameters in the course of training, or if the
        owner of the parameter is in evaluation mode, as ``LightningModule.freeze`` sets it.
        """
        if param.requires_grad:
            return False
        owner = self._owners.get(param)
        return self._will_unfreeze or (owner is not None and not owner.training)


_UNFREEZING = {"requires_grad", "requires_grad_", "unfreeze"}
_AT_START = {
    "__init__",
    "__new__",
    "setup",
    "configure_model",
    "configure_optimizers",
    "on_fit_start",
    "on_train_start",
}
"""Methods that are called before the first step: what they freeze stays frozen."""

_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_optim", "builtins"}


def _may_unfreeze(cls: type) -> bool:
    """Return whether a method of a user's class refers to `requires_grad` after the start of training."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]
    methods = (value for base in own for name, value in vars(base).items() if name not in _AT_START)
    return any(isinstance(method, FunctionType) and _mentions(method.__code__) for method in methods)


def _mentions(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return bool(_UNFREEZING.intersection(code.co_names)) or any(map(_mentions, inner))
