"""Steps of a LightningModule as its Trainer would run them, in device and precision, without an update."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.tuning.inspection import _lightning as private


class LightningSteps:
    """Forward and backward of a LightningModule.

    Args:
        model: The module.
        data: Loaders or a data module, as ``fit`` takes them; None for those of the module, or of a fit that runs.
        trainer: The Trainer; None for that of a fit that runs, or a new one.
    """

    def __init__(self, model: L.LightningModule, data: Any, trainer: L.Trainer | None) -> None:
        present = private.trainer_of(model)
        self.running = present is not None and private.is_fitting(present, model) and trainer in (None, present)
        self.trainer = present if self.running and present is not None else trainer or _quiet_trainer(model)
        # `fit` takes a list for one of loaders; batches are told from these.
        batches = isinstance(data, list) and all(isinstance(each, Tensor | tuple | dict) for each in data)
        self.model, self.data = model, Batches(data) if batches and data else data
        if not is_overridden("training_step", model):
            raise ValueError(f"{type(model).__name__} has no training_step, which is what is looked at.")
        if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                f"training_step of {type(model).__name__} takes dataloader_iter, and batches that it draws itself "
                "would be missing in training. Look at the module with step= and batches instead."
            )

    @property
    def scale(self) -> float:
        """By what the loss is multiplied before backward, in 16-bit training."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def roots(self) -> list[Any]:
        """What a step may change, in addition to the model."""
        return [self.trainer, self.data]

    def left(self) -> list[Any]:
        """What is not to be followed from there."""
        return list(self.trainer.loggers)

    def start(self) -> None:
        """Bring module and data to where they are when training starts; in a fit, they are there.

        The module's own hooks of the start run, because they may make what its steps need. Callbacks and loggers of
        the Trainer get nothing.
        """
        model, trainer = self.model, self.trainer
        stand_ins = _StandIns(self)
        if not self.running:
            datamodule = self.data if isinstance(self.data, L.LightningDataModule) else None
            private.enter(trainer, model, datamodule, None if datamodule is not None else self.data)
            private.silence(trainer)
            for part in (datamodule, model):
                if part is not None:
                    part.prepare_data()
            for part in (datamodule, model):
                if part is not None:
                    part.setup("fit")
            model.configure_model()
            private.place(trainer, model)
            if not model.automatic_optimization and is_overridden("configure_optimizers", model):
                stand_ins.optimizers = [StandIn(each) for each in private.configured_optimizers(trainer, model)]
        else:
            private.silence(trainer)
            stand_ins.optimizers = [StandIn(each) for each in trainer.optimizers]
        stand_ins.put_on(model)
        if not self.running:
            for hook in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
                getattr(model, hook)()

    def batches(self, count: int) -> Iterator[Any]:
        """Yield the first batches of the training data, on the device."""
        trainer, model = self.trainer, self.model
        data = self.data if self.running else None
        for batch in private.training_batches(trainer, data, count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def run(self, batch: Any, index: int) -> Tensor | None:
        """Run ``training_step`` and, in automatic optimization, backward."""
        model = self.model
        arguments: dict[str, Any] = {}
        if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2):
            arguments["batch_idx"] = index
        model.on_train_batch_start(batch, index)
        with self.trainer.precision_plugin.train_step_context():
            output = model.training_step(*([batch, index] if arguments else [batch]))
        if not model.automatic_optimization:
            return None
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            return None
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Call the module's ``backward`` on the loss, scaled as the precision has it."""
        self.model.backward(loss * self.scale if self.scale != 1.0 else loss, *args, **kwargs)


class Batches:
    """Batches in a list, as one loader.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class StandIn:
    """An optimizer that a module gets in place of its own: it answers as that one does, and takes no step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["optimizer"], name)

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """Evaluate the closure, if there is one, and leave the parameters."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def toggle_model(self, sync_grad: bool = True) -> Any:
        """Return a context in which nothing is toggled."""
        return nullcontext()


class NoOptimizer:
    """What a module without optimizers gets in manual optimization: one that takes no step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.0}]

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """Evaluate the closure, if there is one, and leave the parameters."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none)

    def __iter__(self) -> Any:
        raise ValueError(
            f"{type(self.model).__name__} asks for several optimizers, and none is configured. Give it a "
            "configure_optimizers, or the Trainer a ConfigureOptimizers with its optimizers."
        )


class _Moves:
    """A scheduler that takes no step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["scheduler"], name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Leave the rates."""


class _StandIns:
    """What a module's step calls to log and to train, put in place on the instance."""

    def __init__(self, steps: LightningSteps) -> None:
        self.steps = steps
        self.optimizers: list[StandIn] = []

    def put_on(self, model: nn.Module) -> None:
        """Set them on the instance, where what is kept of it removes them again."""
        schedulers: list[Any] = [_Moves(config.scheduler) for config in self.steps.trainer.lr_scheduler_configs]

        def nothing(*args: Any, **kwargs: Any) -> None:
            """Do nothing."""

        def optimizers(use_pl_optimizer: bool = True) -> Any:
            if not self.optimizers:
                return NoOptimizer(model)
            return self.optimizers[0] if len(self.optimizers) == 1 else list(self.optimizers)

        def lr_schedulers() -> Any:
            return (schedulers[0] if len(schedulers) == 1 else schedulers) if schedulers else None

        vars(model).update(
            log=nothing,
            log_dict=nothing,
            clip_gradients=nothing,
            toggle_optimizer=nothing,
            untoggle_optimizer=nothing,
            optimizers=optimizers,
            lr_schedulers=lr_schedulers,
            manual_backward=self.steps.backward,
        )


def _quiet_trainer(model: nn.Module) -> L.Trainer:
    """A Trainer of the device that the module is on, which says nothing."""
    parameter = next(model.parameters(), None)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return L.Trainer(
            accelerator="cpu" if parameter is None or parameter.device.type == "cpu" else "auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        logger.setLevel(level)
