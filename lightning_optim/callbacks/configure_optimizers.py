from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._hub import CHECKPOINT_KEY, HubCallback
from lightning_optim.callbacks._lightning import found_lr
from lightning_optim.callbacks._packages import is_lightning, module_overrides
from lightning_optim.callbacks.schedule_free import schedule_free_notes
from lightning_optim.core.durations import Horizon
from lightning_optim.core.typed import checked, typed
from lightning_optim.core.user_frame import depth_outside
from lightning_optim.factory import OptimizerFactories, OptimizerFactory, PartOptimizer
from lightning_optim.factory.about import optimizer_names
from lightning_optim.param_groups import Entry
from lightning_optim.schedules import Schedule, Warmup

_METHOD = "configure_optimizers"
_WRONG_NUMBER = re.compile(r"unpack|not subscriptable|not iterable|has no len\(\)|index out of range")
"""What Python says where a module takes more or fewer optimizers from ``self.optimizers()`` than there are."""


class _Factory(OptimizerFactory):
    """A factory that reports on the first rank only."""

    def _tell(self, message: str, warn: bool) -> None:
        if warn:
            rank_zero_warn(message, stacklevel=3 + depth_outside())  # 3 of it and of what it is called through
        else:
            rank_zero_info(message)


@typed(own=("optimizer", "schedule", "schedules", "optimizers"))
class ConfigureOptimizers(HubCallback, _Factory):
    r"""Supplies the optimizer, its parameter groups and its schedule; the module's own are not asked.

    Takes the arguments of [`OptimizerFactory`][lightning_optim.OptimizerFactory]. The schedule moves once per optimizer
    step, ends where training ends, and stands still on skipped steps.

    Lightning insists that the class of the module defines ``configure_optimizers``. For one that does not, use
    `lightning_optim.OptimCLI`, or [`attach`][lightning_optim.attach] this callback to the module before ``fit``.

    A module that optimizes manually may have several optimizers, each of a part of it: ``optimizers`` lists them, and
    ``self.optimizers()`` returns them in that order.

    Args:
        optimizer: Which optimizer: a name (`lightning_optim.optim.list_optimizers`), an import path, a class, a mapping
            with ``class_path`` and ``init_args`` as in YAML, or any callable from parameter groups to an optimizer.
        lr: Peak learning rate of the groups without a multiplier, above 0. None for the optimizer's default. Not with a
            callable or ``init_args``, which bring their own.
        weight_decay: Weight decay of the groups without their own, at least 0. None for the optimizer's default.
        optimizer_kwargs: Further arguments of the optimizer, for instance ``{"betas": (0.9, 0.95)}``.
        schedule: A name (`lightning_optim.schedules.list_schedules`), a `Schedule`, a function from the step to a
            multiplier, or a torch ``LRScheduler``: a class, a mapping with ``class_path`` and ``init_args``, or a
            callable from the optimizer to one. None keeps the rate constant, after the warmup if there is one.
        warmup: Length of the warmup for a schedule given by name: ``500``, ``"500 steps"``, ``"2 epochs"``, ``"5%"``;
            or a `Warmup`, which has a shape and a start, too.
        param_groups: Rules and presets, the first match wins. None means the preset ``no_decay``: no weight decay on
            biases, norms and embeddings, which is nearly always what is wanted. An empty list means one group,
            which is all that LBFGS takes.
        schedules: Schedules of other hyperparameters by name, each a name or a `Schedule`: a key of the optimizer's
            groups (``weight_decay``), or ``momentum``, ``beta1``, ``beta2``. They multiply each group's own value.
        on_resume: Resume policy: whether checkpoint or configuration takes precedence. ``"checkpoint"``: the run
            continues bit for bit, and a warning names what differs in the configuration. ``"config"``: learning rate,
            weight decay, schedule, its length, ``fused`` and all else are the configuration's; moments and steps stay,
            and what changed is printed. It is the policy of several optimizers as well.
        optimizers: In place of all arguments before ``on_resume``: the optimizers of several parts, each a
            `PartOptimizer` or a mapping with its arguments.

    Raises:
        ValueError: An argument is unknown, out of range or given twice; the message names the nearest. Or one is given
            in addition to ``optimizers``.
        TypeError: ``optimizer`` or ``schedule`` is of no kind that is accepted.

    Example:
        >>> trainer = L.Trainer(
        ...     callbacks=[ConfigureOptimizers("adamw", lr=3e-4, weight_decay=0.1, schedule="cosine", warmup="5%")],
        ...     logger=False, enable_checkpointing=False,
        ... )
        >>> two = ConfigureOptimizers(optimizers=[
        ...     {"name": "generator", "part": "gen", "optimizer": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
        ...     {"name": "discriminator", "part": "disc", "optimizer": "adam", "lr": 1e-4, "schedule": "linear"},
        ... ])
    """

    role = "ConfigureOptimizers"
    _found: tuple[Callable[[], Any], float] = (lambda: None, 0.0)
    """The module of a finder's fit, held weakly, and what it has found."""

    def __init__(
        self,
        optimizer: str | Callable[[Iterable[Any]], Optimizer] | Mapping[str, Any] = "adamw",
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        schedule: str | Schedule | Callable[[Any], Any] | Mapping[str, Any] | None = None,
        warmup: int | str | Warmup | None = None,
        param_groups: Sequence[Entry] | None = None,
        schedules: Mapping[str, str | Schedule] | None = None,
        on_resume: str = "checkpoint",
        optimizers: Sequence[PartOptimizer] | None = None,
    ) -> None:
        of_one = {
            "optimizer": optimizer,
            "lr": lr,
            "weight_decay": weight_decay,
            "optimizer_kwargs": optimizer_kwargs,
            "schedule": schedule,
            "warmup": warmup,
            "param_groups": param_groups,
            "schedules": schedules,
        }
        self._several: OptimizerFactories | None = None
        if optimizers is None:
            super().__init__(**of_one, on_resume=on_resume)  # type: ignore[arg-type]
            return
        defaults = inspect.signature(OptimizerFactory).parameters
        given = [name for name, value in of_one.items() if value is not defaults[name].default]
        if given:
            raise ValueError(
                f"{', '.join(given)} given in addition to optimizers=[...]: write "
                f"{'it' if len(given) == 1 else 'them'} into each optimizer of the list."
            )
        self._several = OptimizerFactories(optimizers, on_resume, make=_Factory)

    @property
    def schedule(self) -> Any:
        """The schedule of the learning rate; None for several optimizers, each of which has its own."""
        return None if self._several is not None else super().schedule

    @property
    def names(self) -> list[str]:
        """The names of several optimizers, in their order; empty for one."""
        return [] if self._several is None else self._several.names

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizers and their hyperparameters, for tables of runs."""
        return super().settings if self._several is None else self._several.settings

    @checked
    def build(
        self, model: nn.Module, horizon: Horizon | None = None, owner: nn.Module | None = None
    ) -> tuple[Optimizer, Any]:
        """Make the optimizer and its scheduler; see `OptimizerFactory`.

        Raises:
            ValueError: As of `OptimizerFactory`; or there are several optimizers.
        """
        if self._several is not None:
            raise ValueError(f"{self!r} makes several optimizers. In a plain loop, build each by its OptimizerFactory.")
        return super().build(model, horizon, owner)

    def __call__(self, module: Any, owner: Any = None) -> Any:
        """Return what Lightning expects of ``configure_optimizers``."""
        of, found = self._found
        self._found_lr = found if of() is module else None
        if self._several is not None:
            if self._found_lr is not None:
                rank_zero_warn(
                    f"{self!r} leaves out the learning rate {found:.6g} that LearningRateFinder has found: it is one "
                    "for all, and each of several optimizers has its own."
                )
            return self._several(module)
        if self._found_lr is not None:
            rank_zero_info(f"{self!r} takes the learning rate {found:.6g} that LearningRateFinder has found.")
        return super().__call__(module, owner)

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of the module's method for the time of the fit."""
        self._saved_names = ()
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
        rank_zero_info(f"{self!r} replaces {type(pl_module).__name__}.configure_optimizers.{self._advice(pl_module)}")
        attach(pl_module, self)
        self.hub.on_close(lambda: vars(pl_module).pop(_METHOD, None))

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell what a Schedule-Free optimizer lacks, whose validation would be of other weights without a word."""
        for note in schedule_free_notes(trainer, [bare(optimizer) for optimizer in trainer.optimizers]):
            rank_zero_warn(note)

    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Note the order of the module's parameters, for the state of an optimizer that saved no names.

        Raises:
            ValueError: It has these optimizers in another order: Lightning restores them by their places.
        """
        self._saved_names = tuple(checkpoint.get("state_dict", ()))
        saved = checkpoint.get(CHECKPOINT_KEY, {}).get("optimizers", [])
        names = [] if self._several is None else self._several.names
        if any(name in saved and saved.index(name) != place for place, name in enumerate(names)):
            raise ValueError(
                f"The checkpoint has the optimizers {', '.join(saved)}, in this order, and the configuration "
                f"{', '.join(names)}. Write them in the checkpoint's order, in which `self.optimizers()` returns them."
            )

    def _advice(self, pl_module: L.LightningModule) -> str:
        """What to do if the module's own method makes several optimizers, which only a call of it would show."""
        if pl_module.automatic_optimization or self._several is not None:
            return ""
        return (
            f" {type(pl_module).__name__} optimizes manually, and `self.optimizers()` returns this one optimizer, of "
            f"all parameters. {_HOW_TO_HAVE_SEVERAL}"
        )

    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Explain an error of a module that takes another number of optimizers than there is."""
        if pl_module.automatic_optimization or not isinstance(exception, TypeError | ValueError | IndexError):
            return
        message = str(exception)
        of_list = "Lightning" in message or "values to unpack" in message or "index out of range" in message
        if not (of_list and _WRONG_NUMBER.search(message)):
            return
        names = optimizer_names([bare(optimizer) for optimizer in trainer.optimizers])
        if self._several is None:
            hint = (
                f"{self!r} replaces {type(pl_module).__name__}.configure_optimizers and makes one optimizer, which "
                f"`self.optimizers()` returns. {_HOW_TO_HAVE_SEVERAL}"
            )
        else:
            hint = f"If this comes from `self.optimizers()`: it returns {len(names)}: {', '.join(names)}."
        exception.args = (f"{message}. {hint}", *exception.args[1:])

    def __repr__(self) -> str:
        if self._several is None:
            return super().__repr__()
        return f"{type(self).__name__}(optimizers={self._several.names})"

    def _at_close(self) -> None:
        """Keep what a LearningRateFinder has found: a Tuner runs it in a fit of its own, before the real one."""
        if (found := found_lr(self.hub.trainer)) is not None:
            self._found = (weakref.ref(self.hub.trainer.lightning_module), found)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add the way out to Lightning's messages about a missing method, and about clipping."""
        if isinstance(exception, RuntimeError) and "does not allow for gradient clipping" in str(exception):
            exception.args = (
                f"{exception} It is: {self!r} has made it so, and where a GradScaler is, gradients that a fused "
                "optimizer gets still carry the loss scale. Use the callback lightning_optim.GradientClipping, which "
                "clips in the kernel, in place of clip_gradients; or give the optimizer fused=False, if it is torch's.",
            )
        # Lightning verifies the module before it calls any hook of a callback, so this is the first chance to help.
        missing = is_lightning(exception, "MisconfigurationException") and f"No `{_METHOD}()`" in str(exception)
        if missing and not module_overrides(pl_module, _METHOD):
            name = type(pl_module).__name__
            exception.args = (
                f"{name} defines no configure_optimizers, and Lightning checks that before a callback can supply "
                "it. Either call `lightning_optim.attach(model, callback)` with this ConfigureOptimizers before "
                "`trainer.fit(model)`, or use `lightning_optim.OptimCLI` (`lightning-optim fit`), which does so.",
            )


def attach(model: L.LightningModule, factory: OptimizerFactory | OptimizerFactories) -> None:
    """Give a module that defines no ``configure_optimizers`` the one of ``factory``.

    Args:
        model: The module; it keeps the method until it is attached to no more (it is an instance attribute).
        factory: An `OptimizerFactory` or `OptimizerFactories`, or the `ConfigureOptimizers` callback that the Trainer
            will have.

    Raises:
        TypeError: ``factory`` is neither.
        MisconfigurationException: Something else has been attached already.

    Example:
        >>> model = L.LightningModule()
        >>> attach(model, OptimizerFactory("adamw", lr=1e-3))
    """
    if not isinstance(factory, OptimizerFactory | OptimizerFactories):
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


def attach_first(model: L.LightningModule, callbacks: Iterable[Any]) -> None:
    """Attach the first `ConfigureOptimizers` among callbacks to a module that defines no ``configure_optimizers``.

    Args:
        model: The module, which is left as it is if it defines the method.
        callbacks: The callbacks of a Trainer.
    """
    if not module_overrides(model, _METHOD):
        for callback in callbacks:
            if isinstance(callback, ConfigureOptimizers):
                attach(model, callback)
                break


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


_HOW_TO_HAVE_SEVERAL = (
    "If the module works with several optimizers, list them, each with the path of its part: "
    'ConfigureOptimizers(optimizers=[{"name": "generator", "part": "gen", "optimizer": "adam", "lr": 2e-4}, '
    '{"name": "discriminator", "part": "disc", ...}]).'
)


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
