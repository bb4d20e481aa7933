"""Everything private that is relied on, of Lightning and of GradScaler; a new release breaks this file or nothing.

``tests/callbacks/test_lightning.py`` says what is relied on.
"""

from __future__ import annotations

from math import inf
from typing import Any
from weakref import WeakMethod

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.trainer.configuration_validator import _verify_loop_configurations
from lightning.pytorch.trainer.connectors.data_connector import (
    _parse_num_batches,
    _process_dataloader,
    _request_dataloader,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES, CombinedLoader
from torch import Tensor
from torch.nn import Module

from lightning_optim.callbacks._packages import is_lightning


class ModuleMethod:
    """``callback.log`` or ``callback.log_dict``, a method of the module; tells the callback when a run begins.

    Lightning sets both on every callback before it verifies the run and before any hook. So a callback hears of each
    run even if a subclass overrides all of its hooks: its ``_attached(trainer)`` is called. The method is held weakly;
    else a callback would keep the module, and with it the Trainer and the optimizer, alive after the fit.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn which of the two it is."""
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """The method of the module of the present run."""
        if instance is None:
            return self
        held = vars(instance).get(self._name)
        method = held() if isinstance(held, _Weak) else held
        if method is None:
            raise AttributeError(f"{type(instance).__name__}.{self._name} is there while a Trainer runs, not before")
        return method

    def __set__(self, instance: Any, method: Any) -> None:
        """Take what Lightning sets, or anything that a test of the user's does."""
        module: Any = getattr(method, "__self__", None)
        if not is_lightning(module, "LightningModule"):
            vars(instance)[self._name] = method
            return
        vars(instance)[self._name] = _Weak(method)
        if self._name == "log" and module._trainer is not None:
            instance._attached(module._trainer)


class _Weak:
    """A weak reference to a bound method, which a copy of its holder does not have."""

    def __init__(self, method: Any = None) -> None:
        self._method = None if method is None else WeakMethod(method)

    def __call__(self) -> Any:
        return None if self._method is None else self._method()

    def __reduce__(self) -> Any:
        return _Weak, ()


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers of its modules add."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def logging_step(trainer: Trainer) -> int:
    """Where ``LightningModule.log`` puts the present batch on the loggers' axis.

    It is ``global_step`` with one optimizer, but advances once per batch however many optimizers step.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logging_due(trainer: Trainer) -> bool:
    """Whether ``LightningModule.log`` writes at the present batch: every ``log_every_n_steps``-th step."""
    return trainer._logger_connector.should_update_logs


def data_parallel_size(trainer: Trainer) -> int:
    """Among how many ranks batches are shared out; ranks of a tensor-parallel group all compute on the same ones.

    Lightning gives it as what a sampler needs; strategies on one device have nothing to say.
    """
    sampling = trainer.distributed_sampler_kwargs
    return trainer.world_size if sampling is None else int(sampling["num_replicas"])


def loss_scale(trainer: Trainer) -> Tensor | None:
    """By what the GradScaler of 16-bit training multiplies the loss, on the device; None without one.

    torch's public ``get_scale`` makes the host wait for the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler._scale


def averaged_models(trainer: Trainer) -> list[Module]:
    """Return the averages of the model that Lightning's `WeightAveraging` callbacks keep, such as an EMA."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [c._average_model for c in callbacks if is_lightning(c, "WeightAveraging")]  # type: ignore[attr-defined]
    return [model for model in found if model is not None]


def minimum_left(trainer: Trainer) -> str | None:
    """Return the arguments of the Trainer because of which it continues after ``should_stop``; None if it ends now."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    left = []
    if loop.min_epochs and epochs.processed < loop.min_epochs:
        left.append(f"min_epochs={loop.min_epochs}")
    if loop.min_steps and loop.epoch_loop.global_step < loop.min_steps:
        left.append(f"min_steps={loop.min_steps}")
    return ", ".join(left) or None


def found_lr(trainer: Trainer) -> float | None:
    """Return the learning rate that a LearningRateFinder on the Trainer has found and set; None without one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for finder in callbacks:
        if issubclass(type(finder), LearningRateFinder):
            assert isinstance(finder, LearningRateFinder)
            if finder.optimal_lr is not None and finder._update_attr:
                return finder.optimal_lr.suggestion()
    return None


def enter_fit(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, loaders: Any = None
) -> None:
    """Bring a Trainer to where ``fit`` is when it begins: it knows its model, its data and what it is doing."""
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, train_dataloaders=loaders, datamodule=datamodule)
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True


def verify(trainer: Trainer) -> None:
    """Lightning's own checks of Trainer and module, which ``fit`` makes before anything else."""
    _verify_loop_configurations(trainer)


def count_training_batches(trainer: Trainer) -> list[Any]:
    """Count the batches of an epoch as ``fit`` will see them, without iterating, for ``trainer.num_training_batches``.

    Returns the loaders, as ``fit`` will use them.

    The steps of Lightning's ``fit_loop.setup_data`` before it makes an iterator, which would start loading.
    """
    source = trainer.fit_loop._data_source
    loader: Any = _request_dataloader(source)
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    stage = RunningStage.TRAINING
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        _resolve_overfit_batches(combined, mode=stage)
    combined.flattened = [_process_dataloader(trainer, TrainerFn.FITTING, stage, part) for part in combined.flattened]
    combined.limits = [
        _parse_num_batches(stage, inf if (length := sized_len(part)) is None else length, trainer.limit_train_batches)
        for part in combined.flattened
    ]
    mode = _SUPPORTED_MODES[combined._mode]["iterator"](combined.flattened, combined.limits)
    trainer.fit_loop.max_batches = mode.__len__()  # not `len`, which refuses an infinity
    return list(combined.flattened)


def configure_optimizers(trainer: Trainer, model: LightningModule) -> None:
    """Call ``configure_optimizers``, as ``fit`` does, and hand what it returns to the Trainer."""
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(model)
