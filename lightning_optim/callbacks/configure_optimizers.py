from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._lightning import found_lr
from lightning_optim.factory import OptimizerFactory

_METHOD = "configure_optimizers"


class ConfigureOptimizers(HubCallback, OptimizerFactory):
    r"""Supplies the optimizer, its parameter groups and its schedule; the module's own are not asked.

    Takes the arguments of [`OptimizerFactory`][lightning_optim.OptimizerFactory]. The schedule moves once per optimizer
    step, ends where training ends, and stands still on skipped steps.

    Lightning insists that the class of the module defines ``configure_optimizers``. For one that does not, use
    `lightning_optim.OptimCLI`, or [`attach`][lightning_optim.attach] this callback to the module before ``fit``.

    Example:
        >>> trainer = L.Trainer(
        ...     callbacks=[ConfigureOptimizers("adamw", lr=3e-4, weight_decay=0.1, schedule="cosine", warmup="5%")],
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    role = "ConfigureOptimizers"
    _found: tuple[Callable[[], Any], float] = (lambda: None, 0.0)
    """The module of a finder's fit, held weakly, and what it has found."""

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of the module's method for the time of the fit."""
        if self.hub.has_configured:
            raise MisconfigurationException(
                f"{self!r} came to the Trainer when its optimizers were made already. Give it to "
                "`Trainer(callbacks=[...])`, or add it in `configure_callbacks` or in another callback's `setup`."
            )
        present = vars(pl_module).get(_METHOD)
        owner = _owner(present)
        if isinstance(owner, ConfigureOptimizers) and owner._hub is not None and owner._hub is not self._hub:
            owner._hub.abandon()  # It is left of a fit that ended without any hook.
            present = vars(pl_module).get(_METHOD)
        if present is not None:
            if _owner(present) is not self:
                raise MisconfigurationException(
                    f"Two owners of the optimizer of {type(pl_module).__name__}: {self!r}, and {_describe(present)}. "
                    "Remove one."
                )
            return
        rank_zero_info(f"{self!r} replaces {type(pl_module).__name__}.configure_optimizers.")
        attach(pl_module, self)
        self.hub.on_close(lambda: vars(pl_module).pop(_METHOD, None))

    def _at_close(self) -> None:
        """Keep what a LearningRateFinder has found: a Tuner runs it in a fit of its own, before the real one."""
        if (found := found_lr(self.hub.trainer)) is not None:
            self._found = (weakref.ref(self.hub.trainer.lightning_module), found)

    def __call__(self, module: Any) -> Any:
        """Return what Lightning expects of ``configure_optimizers``, at the learning rate that a finder has found."""
        of, found = self._found
        self._found_lr = found if of() is module else None
        if self._found_lr is not None:
            rank_zero_info(f"{self!r} takes the learning rate {found:.6g} that LearningRateFinder has found.")
        return super().__call__(module)

    def _tell(self, message: str, warn: bool) -> None:
        (rank_zero_warn if warn else rank_zero_info)(message)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add the way out to Lightning's messages about a missing method, and about clipping."""
        if isinstance(exception, RuntimeError) and "does not allow for gradient clipping" in str(exception):
            exception.args = (
                f"{exception} It is: {self!r} has made it so, and where a GradScaler is, gradients that a fused "
                "optimizer gets still carry the loss scale. Use the callback lightning_optim.GradientClipping, which "
                "clips in the kernel, in place of clip_gradients; or give the optimizer fused=False, if it is torch's.",
            )
        # Lightning verifies the module before it calls any hook of a callback, so this is the first chance to help.
        missing = isinstance(exception, MisconfigurationException) and f"No `{_METHOD}()`" in str(exception)
        if missing and not is_overridden(_METHOD, pl_module):
            name = type(pl_module).__name__
            exception.args = (
                f"{name} defines no configure_optimizers, and Lightning checks that before a callback can supply "
                "it. Either call `lightning_optim.attach(model, callback)` with this ConfigureOptimizers before "
                "`trainer.fit(model)`, or use `lightning_optim.OptimCLI` (`lightning-optim fit`), which does so.",
            )


def attach(model: L.LightningModule, factory: OptimizerFactory) -> None:
    """Give a module that defines no ``configure_optimizers`` the one of ``factory``.

    Args:
        model: The module; it keeps the method until it is attached to no more (it is an instance attribute).
        factory: An `OptimizerFactory`, or the `ConfigureOptimizers` callback that the Trainer will have.

    Raises:
        TypeError: ``factory`` is neither.
        MisconfigurationException: Something else has been attached already.

    Example:
        >>> model = L.LightningModule()
        >>> attach(model, OptimizerFactory("adamw", lr=1e-3))
    """
    if not isinstance(factory, OptimizerFactory):
        raise TypeError(
            f"attach needs an OptimizerFactory or a ConfigureOptimizers callback, got {factory!r}. For instance "
            "attach(model, OptimizerFactory('adamw', lr=1e-3))."
        )
    present = vars(model).get(_METHOD)
    if present is not None and _owner(present) is not factory:
        raise MisconfigurationException(
            f"{type(model).__name__} already has a configure_optimizers attached to it, by "
            f"{_owner(present) or present!r}; cannot attach {factory!r} as well."
        )

    model.configure_optimizers = _Attached(_configure_optimizers, factory, model)  # type: ignore[method-assign]


class _Attached(partial[Any]):
    """The method that a factory supplies; unlike a function made on the spot it goes where a pickled module goes."""

    @property
    def owner(self) -> OptimizerFactory:
        """Who has attached it."""
        owner: OptimizerFactory = self.args[0]
        return owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # Of a copied module; the callback in the Trainer is the one that it was attached by.
        return _Attached(self.func, self.owner, copy.deepcopy(self.args[1], memo))


def _configure_optimizers(factory: OptimizerFactory, model: L.LightningModule) -> Any:
    return factory(model)


def _owner(method: Any) -> OptimizerFactory | None:
    return method.owner if isinstance(method, _Attached) else None


def _describe(method: Any) -> str:
    """Who has set ``configure_optimizers`` on a module."""
    if (owner := _owner(method)) is not None:
        return f"{owner!r}, which has been attached to it"
    made = getattr(method, "__func__", None)  # LightningCLI makes a method of a partial
    if isinstance(made, partial) and made.keywords.keys() >= {"optimizer", "lr_scheduler"}:
        return "LightningCLI, which has set its configure_optimizers for the keys `optimizer` and `lr_scheduler`"
    return f"{method!r}, which was set on the module itself (`model.configure_optimizers = ...`)"
